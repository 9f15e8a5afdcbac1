"""One request and its response, on their way through the server."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

from pifa_vllm_server.errors import RefusedError, openai_shaped
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# nginx's number for a client that closed the connection.
CLIENT_CLOSED = 499
# For the app to return after it was told that its client is gone, and for the client to take a refusal.
_LAST_SECONDS = 5.0
# Where the HTTP server puts the `Connection` into a request's scope.
CONNECTION = "pifa.connection"


@dataclass
class Connection:
    """What the HTTP server knows of a request's connection.

    Attributes:
        refusal: why the server closed it, None if it did not.
    """

    refusal: RefusedError | None = None


class Exchange:
    """Stands between the HTTP server and vLLM's app for one request.

    Giving up a request tells the app that its client has disconnected, which is how vLLM frees what the request
    holds in the engine. Cancelling alone would not: vLLM answers requests without streaming from a task of their
    own.

    Attributes:
        status: of the response, None before it starts.
        refusal: why the request was given up, None if it was not.
        client_gone: whether the client closed the connection before the end.
    """

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self.status: int | None = None
        self.refusal: RefusedError | None = None
        self.client_gone = False
        self._receive, self._send = receive, send
        self._request_id = request_id.encode()
        self._body: bytes | None = None
        self._streams = self._complete = False
        self._waiting: set[asyncio.Future[Message]] = set()
        self._error_start: Message | None = None

    async def run(self, app: ASGIApp, scope: Scope, body: bytes | None = None, limit: float = 0.0) -> None:
        """Run the app on the request, and see to it that there is an answer.

        Args:
            app: vLLM's.
            scope: of the request.
            body: if it has been read already.
            limit: seconds after which the request is given up; 0 for no limit.
        """
        self._body = body
        loop = asyncio.get_running_loop()
        task = cast("asyncio.Task[None]", asyncio.current_task())
        timers = []
        if limit:
            timeout = RefusedError(HTTPStatus.GATEWAY_TIMEOUT, "timeout", f"Given up after {limit:g} s.")
            timers = [
                loop.call_later(limit, self.give_up, timeout),
                loop.call_later(limit + _LAST_SECONDS, task.cancel),
            ]
        try:
            await app(scope, self._receive_for_app, self._send_for_app)
        except asyncio.CancelledError:
            if self.refusal is None:
                raise
        finally:
            for timer in timers:
                timer.cancel()
        if self.refusal is None and CONNECTION in scope:
            self.refusal = scope[CONNECTION].refusal
        if self.refusal is not None:
            await self.refuse(self.refusal)

    @property
    def outcome(self) -> int:
        """The HTTP status that tells what became of the request, also where another one had been sent before."""
        if self.client_gone:
            return CLIENT_CLOSED
        return self.refusal.status if self.refusal else self.status or HTTPStatus.INTERNAL_SERVER_ERROR

    def give_up(self, refusal: RefusedError) -> None:
        """Tell the app that its client is gone; `run` answers with the refusal when the app has returned."""
        self.refusal = self.refusal or refusal
        for waiting in self._waiting:
            waiting.cancel()

    async def refuse(self, refusal: RefusedError) -> None:
        """Send a refusal: as the response, or as the last event of a stream that has begun.

        A client that reads too slowly to take it does not get it: the request would hold its slot meanwhile.
        """
        self.refusal = refusal
        if self.client_gone or self._complete:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SECONDS):
                if self.status is None:
                    await refusal.response()({"type": "http"}, self._receive, self._pass_on)
                elif self._streams:
                    event = {"type": "http.response.body", "body": refusal.event(), "more_body": False}
                    await self._pass_on(event)

    async def _receive_for_app(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.refusal is None:
            # The app may wait in two tasks: its handler's and its response's.
            waiting = asyncio.ensure_future(self._receive())
            self._waiting.add(waiting)
            try:
                message = await waiting
            except asyncio.CancelledError:
                waiting.cancel()
                if self.refusal is None or cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                    raise
            else:
                self.client_gone |= message["type"] == "http.disconnect" and not self._complete
                return message
            finally:
                self._waiting.discard(waiting)
        return {"type": "http.disconnect"}

    async def _send_for_app(self, message: Message) -> None:
        if self.refusal is not None:
            # An app that never waits for anything else would never learn that its client is gone.
            await asyncio.sleep(0)
        elif message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._error_start = message
        elif self._error_start is not None and not message.get("more_body", False):
            start, self._error_start = self._error_start, None
            body = openai_shaped(start["status"], message.get("body", b""))
            if body is not None:
                message = {**message, "body": body}
                headers = MutableHeaders(raw=list(start.get("headers", ())))
                headers["content-length"] = str(len(body))
                start = {**start, "headers": headers.raw}
            await self._pass_on(start)
            await self._pass_on(message)
        else:
            if self._error_start is not None:
                start, self._error_start = self._error_start, None
                await self._pass_on(start)
            await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message["headers"] = list(message.get("headers", ()))
            self._streams = (b"content-type", b"text/event-stream; charset=utf-8") in headers
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._request_id))
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)
