"""A served checkpoint as a subprocess, and one chat request to it."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

from pifa_vllm.errors import PifaError
from pifa_vllm.served import ServerProcess


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


class Server(ServerProcess):
    """A server with a context of 2,048 tokens.

    Attributes:
        model: its name in the API.

    Args:
        directory: the checkpoint.
        port: first port to try; the next free one is taken.
        log: file for the server's output.

    Raises:
        PifaError: if no port is free.
    """

    def __init__(self, directory: Path, port: int, log: Path) -> None:
        self.port = _free_port(port)
        self.model = str(directory)
        super().__init__(directory, self.port, log, ["--max-model-len", "2048"])


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
