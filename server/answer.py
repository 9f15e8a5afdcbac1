"""One request and its answer, seen as they pass: body, status, broken streams, clients that leave."""

from __future__ import annotations

from http import HTTPStatus

from pifa_vllm_server.errors import RefusedError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Send

# nginx's number for a client that closed the connection.
_CLIENT_CLOSED = 499
# How vLLM's streams say that generating failed, under a status of 200.
_STREAMED_ERRORS = (b'data: {"error"', b"event: error", b"event: response.failed")


class Answer:
    """Stands between the HTTP server and vLLM's app, and changes nothing.

    Attributes:
        started: whether the response's headers were sent.
        status: of the response, or 500 where what came after its headers was an error.
        client_gone: whether the client closed the connection before the end.
        request_id: of the response's X-Request-Id header; "" without one.

    Args:
        receive, send: the HTTP server's.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self.started = self.client_gone = self._complete = False
        self.request_id = ""
        self._receive, self._send = receive, send
        self.status: int = HTTPStatus.INTERNAL_SERVER_ERROR
        self._body: bytes | None = None

    @property
    def outcome(self) -> int:
        """The HTTP status that tells what became of the request, also where another one had been sent before."""
        return _CLIENT_CLOSED if self.client_gone else int(self.status)

    async def read(self, limit: int) -> bytes:
        """Read the whole body; the app gets it in one piece.

        Raises:
            RefusedError: 413 as soon as there are more bytes than `limit`.
            ClientDisconnect: Starlette's, if the client left before the end.
        """
        body = bytearray()
        async for piece in Request({"type": "http"}, self.receive).stream():
            body += piece
            if len(body) > limit:
                text = f"Expected a body of at most {limit} bytes, found more."
                raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, {"Connection": "close"})
        self._body = bytes(body)
        return self._body

    async def receive(self) -> Message:
        """Notice a client that leaves."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self.client_gone = True
        return message

    async def send(self, message: Message) -> None:
        """Notice the status, an error in a stream, and the end."""
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            self.request_id = Headers(raw=message.get("headers", [])).get("x-request-id", "")
        elif message["type"] == "http.response.body":
            if message.get("body", b"").startswith(_STREAMED_ERRORS):
                self.status = HTTPStatus.INTERNAL_SERVER_ERROR
            self._complete = not message.get("more_body", False)
        await self._send(message)
