"""Refusals in the shape of OpenAI's errors, which is also the shape of vLLM's."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse


class RefusedError(Exception):
    """A request that does not reach vLLM, or an answer that it cannot give.

    Args:
        status: of the response.
        message: what was expected and what was found.
        headers: to send along, such as WWW-Authenticate.
    """

    def __init__(self, status: HTTPStatus, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers

    def response(self) -> JSONResponse:
        """What an OpenAI client makes its exception of."""
        kind = self.status.phrase.replace(" ", "").removesuffix("Error") + "Error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.status.value}
        return JSONResponse({"error": error}, self.status, self.headers)
