"""One line in the log per request, in place of uvicorn's: with an id and a duration, and never with a prompt.

vLLM's `--logging-config.formatter json` makes JSON of all log lines; the fields are then fields of the object.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from pifa_vllm_server.answer import Answer

logger = logging.getLogger("vllm.pifa_vllm_server.requests")

# Asked again and again: worth a line only when it fails.
POLLED = frozenset({"/health", "/metrics", "/pifa/info", "/ping", "/ready"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def log_request(scope: Scope, answer: Answer, seconds: float) -> None:
    """Log a request when it is over; `seconds` are from its headers to the last byte. Its query is not logged."""
    level = logging.DEBUG if scope["path"] in POLLED and answer.outcome < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields = {
        # The client may have chosen it: nothing that could pass for another line.
        "request_id": answer.request_id if _REQUEST_ID.fullmatch(answer.request_id) else "-",
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        # As it came: a decoded path may contain newlines.
        "path": scope.get("raw_path", b"").decode("ascii", "backslashreplace"),
        "status": answer.outcome,
        "seconds": round(seconds, 6),
    }
    logger.log(
        level,
        "%(method)s %(path)s %(status)d in %(seconds).3f s, request %(request_id)s, client %(client)s",
        fields,
        extra=fields,
    )
