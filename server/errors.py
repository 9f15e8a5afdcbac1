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
        kind = self.status.phrase.replace(" ", "").replace("-", "") + "Error"
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.status.value,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The response to send where none has begun."""
        return Response(self.body(), self.status.value, self.headers, media_type="application/json")

    def event(self) -> bytes:
        """The last event of a stream that is broken off."""
        return b"data: " + self.body() + b"\n\n"
