"""HTTP connections whose clients cannot make the server wait, or remember, without end.

uvicorn's httptools parser has no limit on headers (vLLM's --h11-max-* flags concern another parser), and waits for
them forever.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from pifa_vllm_server.settings import ServerSettings
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol


class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn is not followed by mypy
    """Closes a connection whose headers are too large or too late, and notices a client that has vanished.

    Headers that are complete and too large are answered as JSON by the server; here it is about those that never
    end.

    Args:
        settings: max_header_bytes, body_timeout, send_timeout.
    """

    def __init__(self, *args: Any, settings: ServerSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._header_bytes = 0
        self._in_headers = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock, and have TCP look whether the other end is still there."""
        super().connection_made(transport)
        self._start_timer()
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            seconds = max(1, int(self._settings.send_timeout))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

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

    def on_headers_complete(self) -> None:
        """From here on the limits on bodies hold."""
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._settings.body_timeout, self._close, 408)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, status: int) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[status] + b"connection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
