"""A vLLM server as a subprocess: started, waited for, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pifa_vllm.errors import PifaError

_START_SECONDS = 600.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.1


class ServerProcess:
    """Started when the context is entered, and stopped when it is left.

    Attributes:
        url: without /v1.
        environment: of the process.
        seconds_to_ready: from the start of the process until it is healthy.

    Args:
        directory: the checkpoint.
        port: on this machine's loopback interface.
        log: file for the server's output.
        flags: of `vllm serve`.
        name: what errors call it.
        environment: variables beside this process's.
        module: what Python runs, with its arguments before the directory.
    """

    def __init__(
        self,
        directory: Path,
        port: int,
        log: Path,
        flags: list[str],
        *,
        name: str = "the server",
        environment: dict[str, str] | None = None,
        module: Sequence[str] = ("pifa_vllm", "serve"),
    ) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        self.environment = dict(os.environ) | (environment or {})
        self.seconds_to_ready = 0.0
        self._title = name
        self._command = [sys.executable, "-m", *module, str(directory)]
        self._command += ["--host", "127.0.0.1", "--port", str(port), *flags]

    def __enter__(self) -> Self:
        """Start; it is not ready yet."""
        self._started = time.monotonic()
        with self.log.open("w") as log:
            # Its own session, so that Ctrl-C reaches this process alone, which then stops the server in order.
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """Of the process that was started, vLLM's API server."""
        return self._process.pid

    def suspend(self) -> None:
        """Halt all of its processes where they are, so that they take no time from others."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def wait_until_ready(self) -> None:
        """Return when it is healthy.

        Raises:
            PifaError: if it ends before or takes too long, with the end of its log.
        """
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._failure(f"ended with exit code {self._process.returncode} before it was ready")
            if time.monotonic() - self._started > _START_SECONDS:
                raise self._failure(f"was not ready after {_START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        self.seconds_to_ready = time.monotonic() - self._started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self._stop()

    def wait(self) -> None:
        """Return when the server ends or Ctrl-C is pressed.

        Raises:
            PifaError: if it ends by itself.
        """
        try:
            self._process.wait()
        except KeyboardInterrupt:
            return
        raise self._failure(f"ended with exit code {self._process.returncode}")

    def get(self, path: str) -> str:
        """Return what it answers.

        Raises:
            OSError: if it does not, or with an error.
        """
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30.0) as response:
            text: str = response.read().decode()
        return text

    def _healthy(self) -> bool:
        try:
            self.get("/health")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self.resume()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _failure(self, what: str) -> PifaError:
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return PifaError(f"{self._title} {what}. The end of its log, {self.log}:\n{end}")


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
