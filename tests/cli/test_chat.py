"""Chat against a server of canned answers, and against none."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from pifa_vllm.cli import main


class Server(ThreadingHTTPServer):
    """Has these models, and answers every chat with these pieces; `cut` breaks the connection after them."""

    models: tuple[str, ...] = ("tiny",)
    pieces: tuple[str, ...] = ("Hel", "lo!")
    cut = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model"} for name in self.server.models]
        body = json.dumps({"object": "list", "data": models}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in self.server.pieces:
            self.chunk(json.dumps({"choices": [{"index": 0, "delta": {"content": piece}}]}))
        if self.server.cut:
            self.close_connection = True
            return
        self.chunk("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, data: str) -> None:
        body = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_answers_are_streamed_and_remembered(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAgain\n\nnot sent\n"))
    assert main(["chat", "--url", server.url + "/", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == "Hello!\nHello!\n"
    first, second = server.asked
    assert (first["model"], first["max_tokens"]) == ("tiny", 7)
    assert [(m["role"], m["content"]) for m in second["messages"]] == [
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Again"),
    ]


def test_a_server_without_models(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.models = ()
    assert main(["chat", "--url", server.url]) == 1
    assert "expected a server of at least one model, found none" in capsys.readouterr().err


def test_a_server_that_dies_in_the_middle_of_an_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut = True
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main(["chat", "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert out == "Hello!"
    assert f"{server.url}: the connection broke off" in err


def test_without_a_server_it_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    shown = capsys.readouterr().err
    assert "http://127.0.0.1:9: no server answers there" in shown
    assert "pifa-vllm serve" in shown
