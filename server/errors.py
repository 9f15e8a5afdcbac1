"""Refusals in the shape of OpenAI's errors, which is also the shape of vLLM's."""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.responses import Response


class RefusedError(Exception):
    """A request that is not worked on.

    Args:
        status: of the response.
        reason: one of a few words, for `pifa_requests_rejected_total`.
        message: what was expected and what was found.
        param: the field at fault.
        headers: to send along, such as Retry-After.
    """

    def __init__(
        self,
        status: HTTPStatus,
        reason: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.param = param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON that an OpenAI client makes its exception of."""
        return _shaped(self.status, self.message, self.param)

    def response(self) -> Response:
        """The response to send where none has begun."""
        return Response(self.body(), self.status.value, self.headers, media_type="application/json")

    def event(self) -> bytes:
        """The last event of a stream that is broken off."""
        return b"data: " + self.body() + b"\n\n"


def openai_shaped(status: int, body: bytes) -> bytes | None:
    """Give an error of the web framework the shape that vLLM's own errors have.

    Args:
        status: of the response.
        body: its whole body.

    Returns:
        The new body, or None where the old one is no such error.
    """
    try:
        found = json.loads(body)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    message = found.get("detail", found.get("error"))
    return _shaped(HTTPStatus(status), message) if isinstance(message, str) else None


def _shaped(status: HTTPStatus, message: str, param: str | None = None) -> bytes:
    kind = status.phrase.replace(" ", "").replace("-", "") + "Error"
    error = {"message": message, "type": kind, "param": param, "code": status.value}
    return json.dumps({"error": error}).encode()
