"""A served checkpoint as a subprocess, and one chat request to it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
from openai import OpenAI

from pifa_vllm.errors import PifaError

_START_SECONDS = 600.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back, and how fast.

    Attributes:
        text: the answer.
        tokens: generated tokens.
        seconds_to_first_token: from the request to the first piece of text.
        tokens_per_second: after the first token.
    """

    text: str
    tokens: int
    seconds_to_first_token: float
    tokens_per_second: float


class Server:
    """`pifa-vllm serve` in a subprocess, ready when the context is entered and stopped when it is left.

    Args:
        directory: the checkpoint.
        port: first port to try; the next free one is taken.
        log: file for the server's output.

    Raises:
        PifaError: if it does not become ready, with the end of its log.
    """

    def __init__(self, directory: Path, port: int, log: Path) -> None:
        self.directory = directory
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.seconds_to_ready = 0.0

    def __enter__(self) -> Server:
        """Start and wait until it is healthy."""
        command = [sys.executable, "-m", "pifa_vllm", "serve", str(self.directory)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "2048"]
        started = time.monotonic()
        with self.log.open("w") as log:
            # Its own session, so that Ctrl-C reaches the demo alone, which then stops the server in order.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while not self._healthy():
                if self._process.poll() is not None:
                    raise self._failure(
                        f"ended with exit code {self._process.returncode} before it was ready"
                    )
                if time.monotonic() - started > _START_SECONDS:
                    raise self._failure(f"was not ready after {_START_SECONDS:.0f} s")
                time.sleep(0.5)
        except BaseException:
            self._stop()
            raise
        self.seconds_to_ready = time.monotonic() - started
        return self

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

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _failure(self, what: str) -> PifaError:
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return PifaError(f"the server {what}. The end of its log, {self.log}:\n{end}")


def ask(url: str, model: str, prompt: str, max_tokens: int = 128) -> Answer:
    """Send one chat request through the openai client and time its stream.

    Args:
        url: of the server, without /v1.
        model: the served model's name.
        prompt: what the user says.
        max_tokens: most tokens to generate.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    started = time.perf_counter()
    first = None
    pieces: list[str] = []
    tokens = 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            first = first or time.perf_counter()
            pieces.append(event.choices[0].delta.content)
        if event.usage is not None:
            tokens = event.usage.completion_tokens
    ended = time.perf_counter()
    first = first or ended
    decode = ended - first
    speed = (tokens - 1) / decode if tokens > 1 and decode > 0.0 else 0.0
    return Answer("".join(pieces).strip(), tokens, first - started, speed)


def _free_port(port: int) -> int:
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return candidate
    raise PifaError(f"--port: expected a free port from {port} on, found the next hundred taken.")
