"""The demo's server process and its chat, against stand-ins that speak the same protocol."""

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pifa_vllm.demo import chat
from pifa_vllm.errors import PifaError


class Streaming(BaseHTTPRequestHandler):
    """Answers any POST with two pieces of text and a usage record."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
        events = [
            {**base, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
            for text in ("Paris", " it is. ")
        ]
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        events.append({**base, "choices": [], "usage": usage})
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


def test_an_answer_is_collected_and_timed():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Streaming)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answer = chat.ask(f"http://127.0.0.1:{server.server_port}", "model", "Where?")
    finally:
        server.shutdown()
    assert answer.text == "Paris it is."
    assert answer.tokens == 5
    assert answer.seconds_to_first_token > 0
    assert answer.tokens_per_second > 0


def test_a_taken_port_is_stepped_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < chat.Server(None, port, None).port < port + 100


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.raises(PifaError, match=r"ended with exit code 1 before it was ready.*server\.log"),
        chat.Server(tmp_path, 8900, tmp_path / "server.log") as server,
    ):
        server.wait_until_ready()
