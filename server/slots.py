"""How many requests are worked on at once, and letting them finish when the server is to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pifa_vllm_server.errors import RefusedError
from vllm.v1.engine.exceptions import EngineDeadError

if TYPE_CHECKING:
    from pifa_vllm_server.metrics import ServerMetrics
    from vllm.engine.protocol import EngineClient

_POLL_SECONDS = 0.05
# The engine's processes get this long to end by themselves.
_ENGINE_SECONDS = 5.0


class Slots:
    """Counts the requests that are worked on.

    Args:
        limit: on their number in this process.
        metrics: where the number is shown.

    Attributes:
        closed: set for good when the server is asked to stop.
    """

    def __init__(self, limit: int, metrics: ServerMetrics) -> None:
        self.active = 0
        self.closed = False
        self._limit = limit
        self._metrics = metrics
        metrics.active_limit.set(limit)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one slot.

        Raises:
            RefusedError: 429 if all are taken, 503 if the server is stopping.
        """
        if self.closed:
            status, text = HTTPStatus.SERVICE_UNAVAILABLE, "The server is stopping."
            raise RefusedError(status, "draining", text, headers={"Connection": "close"})
        if self.active >= self._limit:
            text = f"Expected fewer than {self._limit} requests at once, found as many. Try again later."
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "busy", text, headers={"Retry-After": "1"})
        self.active += 1
        self._metrics.active.set(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self._metrics.active.set(self.active)

    def drain_before_stop(self, engine: EngineClient) -> None:
        """Have running requests finish, and no new ones begin, before vLLM stops the engine.

        vLLM calls `engine.shutdown(timeout)` in a thread when it gets SIGTERM, with --shutdown-timeout, and again
        at the end.
        """
        stop = engine.shutdown

        def drain_and_stop(timeout: float | None = None, **kwargs: Any) -> None:
            deadline = time.monotonic() + (timeout or 0.0)
            if not self.closed:
                self.closed = True
                self._metrics.ready.set(0)
                while self.active and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                logging.getLogger("vllm.v1.engine.async_llm").addFilter(_is_no_dead_engine)
            stop(timeout=max(deadline - time.monotonic(), _ENGINE_SECONDS), **kwargs)

        engine.shutdown = drain_and_stop


def _is_no_dead_engine(record: logging.LogRecord) -> bool:
    """Whether to log it: vLLM reports an engine that was stopped as one that died, with a traceback."""
    return record.exc_info is None or not isinstance(record.exc_info[1], EngineDeadError)
