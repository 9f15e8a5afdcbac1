"""Limits on what a request may contain, checked before vLLM sees it."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.settings import ServerSettings
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import Receive

_INT = TypeAdapter(int)
_MEDIA = frozenset({"image_url", "audio_url", "video_url", "input_audio", "file"})


class ClientGoneError(Exception):
    """The client left before its request was complete."""


def check_headers(request_line: int, headers: Headers, settings: ServerSettings) -> None:
    """Check the size of what precedes the body.

    Args:
        request_line: its length in bytes.
        headers: of the request.
        settings: max_header_bytes, max_body_bytes.

    Raises:
        RefusedError: 431, or 413 where Content-Length announces too much.
    """
    # Four more characters are on every line: a colon, a space, and its end.
    size = request_line + sum(len(name) + len(value) + 4 for name, value in headers.raw)
    if size > settings.max_header_bytes:
        raise RefusedError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "headers",
            f"Expected at most {settings.max_header_bytes} bytes of headers, found {size}.",
            headers={"Connection": "close"},
        )
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > settings.max_body_bytes:
        raise _too_large(int(announced), settings)


async def read_body(receive: Receive, settings: ServerSettings) -> bytes:
    """Read the whole body.

    Raises:
        RefusedError: 413 as soon as it is too large, 408 if it does not arrive in body_timeout seconds.
        ClientGoneError: if the client closed the connection.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > settings.max_body_bytes:
                    raise _too_large(size, settings)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise RefusedError(
            HTTPStatus.REQUEST_TIMEOUT,
            "timeout",
            f"Expected the whole body within {settings.body_timeout:g} s, found {size} bytes of it.",
            headers={"Connection": "close"},
        ) from None


def check_body(body: bytes, settings: ServerSettings) -> dict[str, Any]:
    """Check n, best_of, the number of prompts and their length in a JSON body.

    Whatever else may be wrong with it, malformed JSON and wrong types included, is vLLM's to say.

    Returns:
        The request; nothing where the body is no JSON object.

    Raises:
        RefusedError: 400, naming the field.
    """
    try:
        # As FastAPI does: what another parser refuses would pass unseen here.
        request: Any = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(request, dict):
        return {}
    sampling = request.get("sampling_params")
    for where in (request, sampling if isinstance(sampling, dict) else {}):
        for field in ("n", "best_of"):
            if (value := _as_int(where.get(field))) is not None and value > settings.max_n:
                raise _bad("n", field, f"{field}: expected at most {settings.max_n}, found {value}.")
    for field, single in (("prompt", int), ("messages", dict)):
        items = request.get(field)
        if (
            isinstance(items, list)
            and len(items) > settings.max_prompts
            and not all(isinstance(item, single) for item in items)
        ):
            text = f"{field}: expected at most {settings.max_prompts} prompts, found {len(items)}."
            raise _bad("n", field, text)
    for field, value in request.items():
        length = text_length(value)
        if length > settings.max_prompt_chars:
            text = f"{field}: expected at most {settings.max_prompt_chars} characters, found {length}."
            raise _bad("prompt", field, text)
    return request


def _as_int(value: Any) -> int | None:
    """What vLLM's request makes of a value: "16" and 16.0 are numbers there, too."""
    if value is None or type(value) is int:
        return value
    try:
        return _INT.validate_python(value)
    except ValidationError:
        return None


def text_length(value: Any) -> int:
    """Count the characters of all strings in a JSON value, those of images and the like apart."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            pending.extend(value for key, value in item.items() if key not in _MEDIA)
        elif isinstance(item, list) and item and not isinstance(item[0], int):
            pending.extend(item)
    return total


def _bad(reason: str, param: str, message: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, reason, message, param)


def _too_large(size: int, settings: ServerSettings) -> RefusedError:
    return RefusedError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body",
        f"Expected a body of at most {settings.max_body_bytes} bytes, found {size}.",
    )
