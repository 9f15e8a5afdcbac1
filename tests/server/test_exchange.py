"""Requests that are given up: the app learns that its client is gone, and the client what happened."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

import pytest

pytest.importorskip("starlette")

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.exchange import Exchange
from pifa_vllm_server.limits import ClientGoneError, read_body
from pifa_vllm_server.settings import ServerSettings
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/", "headers": []}


class Client:
    """The other end: it sends nothing after its request, and reads what it gets."""

    def __init__(self, leaves: bool = False) -> None:
        self.leaves = leaves
        self.messages: list[dict] = []

    async def receive(self):
        if self.leaves:
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()

    async def send(self, message):
        self.messages.append(message)

    @property
    def status(self):
        return self.messages[0]["status"]

    @property
    def body(self):
        return b"".join(m.get("body", b"") for m in self.messages[1:])


def run(app, client, *, limit=0.0):
    exchange = Exchange(client.receive, client.send, "id-1")

    async def both():
        async with asyncio.timeout(30):
            await exchange.run(app, dict(SCOPE), b"{}", limit)

    asyncio.run(both())
    return exchange


def test_answers_pass_with_their_request_id():
    async def app(scope, receive, send):
        assert await Request(scope, receive).json() == {}
        await JSONResponse({"a": 1})(scope, receive, send)

    client = Client()
    exchange = run(app, client, limit=10)
    assert (client.status, json.loads(client.body)) == (200, {"a": 1})
    assert (b"x-request-id", b"id-1") in client.messages[0]["headers"]
    assert exchange.refusal is None
    assert exchange.outcome == 200


def waits_until_its_client_leaves(left):
    async def app(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        left.append(True)
        # vLLM's handlers then return nothing, of which FastAPI makes a response.
        await JSONResponse(None)(scope, receive, send)

    return app


def test_timeout_before_the_answer():
    left, client = [], Client()
    exchange = run(waits_until_its_client_leaves(left), client, limit=0.05)
    assert left
    assert client.status == 504
    assert json.loads(client.body)["error"]["message"] == "Given up after 0.05 s."
    assert exchange.refusal.reason == "timeout"
    assert exchange.outcome == 504


def test_timeout_in_a_stream_ends_it_with_an_error():
    closed = []

    async def events():
        try:
            while True:
                yield "data: {}\n\n"
                await asyncio.sleep(0.01)
        finally:
            closed.append(True)

    async def app(scope, receive, send):
        await Request(scope, receive).body()
        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    client = Client()
    assert run(app, client, limit=0.1).outcome == 504
    assert closed
    assert client.status == 200
    last = client.body.split(b"\n\n")[-2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 504
    assert client.messages[-1].get("more_body", False) is False


def test_a_client_that_does_not_take_its_refusal(monkeypatch):
    """It has been sent something, reads a little now and then, and would never have read all."""
    monkeypatch.setattr("pifa_vllm_server.exchange._LAST_SECONDS", 0.05)

    class Slow(Client):
        async def send(self, message):
            await super().send(message)
            if len(self.messages) > 1:
                await asyncio.Event().wait()

    async def events():
        while True:
            yield "data: {}\n\n"

    async def app(scope, receive, send):
        await Request(scope, receive).body()
        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    exchange = run(app, Slow(), limit=0.05)
    assert exchange.refusal.reason == "timeout"


def test_an_app_that_does_not_listen_is_cancelled(monkeypatch):
    monkeypatch.setattr("pifa_vllm_server.exchange._LAST_SECONDS", 0.05)

    async def app(scope, receive, send):
        await asyncio.Event().wait()

    client = Client()
    run(app, client, limit=0.05)
    assert client.status == 504


def test_the_app_may_wait_in_two_tasks():
    """vLLM's handlers listen while they work, and starlette's response does when they are done."""

    async def app(scope, receive, send):
        await Request(scope, receive).body()
        first = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        second = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        assert (await second)["type"] == "http.disconnect"

    client = Client()
    run(app, client, limit=0.05)
    assert client.status == 504


def test_cancelling_from_outside_is_passed_on():
    async def app(scope, receive, send):
        asyncio.current_task().cancel()
        await asyncio.sleep(1)

    with pytest.raises(asyncio.CancelledError):
        run(app, Client(), limit=5)


def test_a_client_that_leaves_is_known_to_have():
    left = []
    exchange = run(waits_until_its_client_leaves(left), Client(leaves=True))
    assert left
    assert exchange.client_gone
    assert exchange.outcome == 499
    assert exchange.refusal is None


def test_bodies_are_limited_in_size_and_time():
    def read(*messages, **settings):
        queue = list(messages)

        async def receive():
            if queue:
                return queue.pop(0)
            await asyncio.Event().wait()

        return asyncio.run(read_body(receive, ServerSettings(**settings)))

    piece = {"type": "http.request", "body": b"abc", "more_body": True}
    last = {**piece, "more_body": False}
    assert read(piece, last) == b"abcabc"
    assert read({"type": "http.request"}) == b""
    with pytest.raises(RefusedError, match="at most 5 bytes, found 6") as caught:
        read(piece, last, max_body_bytes=5)
    assert caught.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    with pytest.raises(RefusedError, match=r"within 0.05 s, found 3 bytes"):
        read(piece, body_timeout=0.05)
    with pytest.raises(ClientGoneError):
        read(piece, {"type": "http.disconnect"})


@pytest.mark.parametrize("content", [{"detail": "Not Found"}, {"error": "Not Found"}])
def test_errors_of_the_framework_get_openais_shape(content):
    async def app(scope, receive, send):
        await JSONResponse(content, 404, {"Allow": "POST"})(scope, receive, send)

    client = Client()
    run(app, client)
    error = {"message": "Not Found", "type": "NotFoundError", "param": None, "code": 404}
    assert json.loads(client.body) == {"error": error}
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-length"] == str(len(client.body)).encode()
    assert headers[b"allow"] == b"POST"


@pytest.mark.parametrize("body", [b'{"error": {"message": "x"}}', b'{"ready": false}', b"", b"text", b"[1]"])
def test_other_errors_pass_as_they_are(body):
    async def app(scope, receive, send):
        await Response(body, 503)(scope, receive, send)

    client = Client()
    run(app, client)
    assert (client.status, client.body) == (503, body)


def test_errors_in_pieces_pass():
    async def pieces():
        yield b'{"detail":'
        yield b' "x"}'

    async def app(scope, receive, send):
        await Request(scope, receive).body()
        await StreamingResponse(pieces(), 500)(scope, receive, send)

    client = Client()
    run(app, client)
    assert (client.status, client.body) == (500, b'{"detail": "x"}')
