"""What the JSON of a request may hold, before vLLM makes its own objects of it.

Of every value that is not what it should be, pydantic makes an error, and one more for each type that it might have
been: 4 MB of empty lists for messages kept vLLM's event loop busy for 93 s, as many empty objects filled 24 GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from pifa_vllm_server.errors import RefusedError

# Where token ids stand, as many as a context holds; elsewhere a number is a value as any other.
_TOKENS = frozenset({"prompt", "prompt_token_ids", "token_ids", "tokens"})
# Whose `input` may be token ids, too.
_POOLING = frozenset({"/classify", "/pooling", "/v1/embeddings", "/v2/embed"})
# Each entry of their `input` may be one of some sixty things, and counts as so many values: 2 ms and 1 MB each.
_RESPONSES, _WEIGHT = frozenset({"/v1/responses", "/v1/responses/render"}), 32


def check_values(path: str, body: bytes, limit: int) -> int:
    """Count the values in a JSON body, at all levels, token ids apart.

    Raises:
        RefusedError: 400 if there are more than `limit`, or if the body is neither JSON nor empty.
    """
    try:
        request = json.loads(body or b"null")
    except (ValueError, RecursionError) as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"Expected JSON, found none ({error}).") from None
    tokens = _TOKENS | {"input"} if path in _POOLING else _TOKENS
    pending: list[tuple[str, Any]] = [("", request)]
    count = 0
    while pending:
        name, value = pending.pop()
        if isinstance(value, list):
            if name in tokens and set(map(type, value)) <= {int} and min(value, default=0) >= 0:
                continue
            inner: Iterable[tuple[str, Any]] = ((name, item) for item in value)
        elif isinstance(value, dict):
            inner = value.items()
        else:
            continue
        count += len(value) * (_WEIGHT if name == "input" and path in _RESPONSES else 1)
        if count > limit:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"Expected at most {limit} values beside token ids.")
        pending.extend(inner)
    return count
