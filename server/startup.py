"""What the log says while the server starts: what is going on, and how long it has taken."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from pifa_vllm_server.memory import resident_by_role, server_pid

logger = logging.getLogger("vllm.pifa_vllm_server")

_EVERY_SECONDS = 10.0
# Set by the process that was started, read by the API server processes that it starts.
_STARTED = "PIFA_SERVER_STARTED_AT"


@contextmanager
def told(what: str) -> Iterator[threading.Event]:
    """Log that the server starts, and every ten seconds that it still does: until the event is set, or the end.

    Nothing is logged after the end, so that an error that the start ends with has the last word.

    Args:
        what: is to be loaded.
    """
    os.environ[_STARTED] = str(time.time())
    done = threading.Event()
    logger.info("starting: %s. Next: engine process, weights, compilation, KV cache.", what)
    teller = threading.Thread(target=_tell, args=(done,), daemon=True)
    teller.start()
    try:
        yield done
    finally:
        done.set()
        teller.join()


def started_at() -> float:
    """When the server was started, in the seconds of time.time()."""
    if _STARTED in os.environ:
        return float(os.environ[_STARTED])
    return psutil.Process(server_pid()).create_time()


def _tell(done: threading.Event) -> None:
    while not done.wait(_EVERY_SECONDS):
        resident = sum(resident_by_role(set()).values())
        logger.info(
            "still starting after %.0f s, %.1f GB resident", time.time() - started_at(), resident / 1e9
        )
