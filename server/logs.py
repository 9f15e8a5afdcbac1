"""One line in the log per request, in place of uvicorn's: with an id and a duration, and never with a prompt.

vLLM's `--logging-config.formatter json` makes JSON of all log lines; the fields are then fields of the object.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pifa_vllm_server.exchange import CLIENT_CLOSED
from starlette.types import Scope

if TYPE_CHECKING:
    from pifa_vllm_server.exchange import Exchange

logger = logging.getLogger("vllm.pifa_vllm_server.requests")

# What asks again and again, and is worth a line only when it fails.
POLLED = frozenset({"/health", "/metrics", "/pifa/info", "/ping", "/ready"})


def log_request(scope: Scope, exchange: Exchange, request_id: str, seconds: float) -> None:
    """Log a request when it is over.

    Args:
        scope: of the request. Its query is not logged.
        exchange: what became of it.
        request_id: the client's or a new one; vLLM's ids of the request contain it.
        seconds: from headers to the last byte.
    """
    # As it came: a decoded path may contain newlines.
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
    status = CLIENT_CLOSED if exchange.client_gone else exchange.status or 0
    level = logging.DEBUG if scope["path"] in POLLED and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    client = scope.get("client")
    fields = {
        "request_id": request_id,
        "client": client[0] if client else "",
        "method": scope["method"],
        "path": path,
        "status": status,
        "seconds": round(seconds, 6),
        "reason": exchange.refusal.reason if exchange.refusal else "",
    }
    logger.log(
        level,
        "%s %s %d in %.3f s, request %s, client %s%s",
        fields["method"],
        path,
        status,
        seconds,
        request_id,
        fields["client"],
        f" ({fields['reason']})" if fields["reason"] else "",
        extra=fields,
    )
