"""HTTP connections whose clients cannot make the server wait, or remember, without end.

uvicorn's httptools parser has no limit on headers (vLLM's --h11-max-* flags concern another parser), and waits for
them forever.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import Any

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.exchange import CONNECTION, Connection
from pifa_vllm_server.settings import ServerSettings
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger("vllm.pifa_vllm_server.requests")

# The most that Linux takes for TCP_KEEPIDLE.
_MAX_KEEPIDLE_SECONDS = 32767


class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn is not followed by mypy
    """Closes a connection whose headers are too large or too late, or whose answers are not read, and notices a
    client that has vanished.

    Headers that are complete and too large are answered as JSON by the server; here it is about those that never
    end. What a client leaves unread stays in the engine's and the server's memory. It is the transport that tells
    when it is too much, so no piece of an answer needs a clock of its own: one for each takes a tenth of the time
    that vLLM spends on a token.

    Args:
        settings: max_header_bytes, body_timeout, send_timeout.
    """

    def __init__(self, *args: Any, settings: ServerSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._header_bytes = 0
        self._in_headers = True
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._connection = Connection()
        # More than one where a client sends its next request before it has the answer to the last.
        self._unanswered: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock, and have TCP look whether the other end is still there."""
        super().connection_made(transport)
        self._start_timer()
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            seconds = int(min(max(1, self._settings.send_timeout), _MAX_KEEPIDLE_SECONDS))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and tell every request of the connection; uvicorn tells the newest only."""
        self._stop_timer()
        self._stop_unread_timer()
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client leaves so much unread that the server has to wait."""
        super().pause_writing()
        self._start_unread_timer()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stop_unread_timer()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the headers go on for too long."""
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        # Twice the limit: a body may have come in the same piece.
        if self._in_headers and self._header_bytes > 2 * self._settings.max_header_bytes:
            self._close(431)

    def on_message_begin(self) -> None:
        """The next request on this connection."""
        self._header_bytes = 0
        self._in_headers = True
        self._start_timer()
        super().on_message_begin()
        self.scope[CONNECTION] = self._connection

    def on_headers_complete(self) -> None:
        """From here on the limits on bodies hold."""
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()
        cycles = [*self._unanswered, self.cycle]
        self._unanswered = [cycle for cycle in cycles if cycle is not None and not cycle.response_complete]

    def handle_websocket_upgrade(self) -> None:
        """From here on the connection is another protocol's."""
        self._stop_unread_timer()
        super().handle_websocket_upgrade()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._settings.body_timeout, self._close, 408)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_unread_timer(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(self._settings.send_timeout, self._leave, unread)

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _leave(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            # A large answer and a slow line: the client does read.
            self._start_unread_timer()
            return
        text = f"The client read nothing for {self._settings.send_timeout:g} s."
        self._connection.refusal = RefusedError(HTTPStatus.REQUEST_TIMEOUT, "slow_client", text)
        if all(cycle.response_complete for cycle in self._unanswered):
            # Otherwise the request's own line says it.
            logger.info("closed the connection of %s with %d bytes unread. %s", self.client, unread, text)
        self.transport.abort()

    def _close(self, status: int) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[status] + b"connection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
