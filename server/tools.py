"""Are the parameters of a request's tools JSON schemas? vLLM takes what is none for no constraint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from pifa_vllm_server.errors import RefusedError

# Objects and lists in the schemas of one request, and how deep they lie: beyond what tools have, and below what
# keeps a processor busy for long, as each of them is checked against the schema of schemas.
MAX_NODES = 4096
MAX_DEPTH = 32
# Agents send the same tools again and again.
_REMEMBERED = 1024
# What generators write that name no draft; of those the first is OpenAI's and vLLM's.
_DRAFTS = (Draft202012Validator, Draft7Validator, Draft4Validator)


async def check_tools(tools: Any) -> None:
    """Check every schema, without holding up other requests.

    Args:
        tools: of a request; whatever else may be wrong with it is vLLM's to say.

    Raises:
        RefusedError: 400, naming the tool and what is wrong in its schema.
    """
    nodes = 0
    for field, schema in schemas(tools):
        count, depth = measure(schema)
        nodes += count
        if nodes > MAX_NODES:
            raise _bad(field, f"expected at most {MAX_NODES} objects and lists in the schemas of all tools")
        if depth > MAX_DEPTH:
            raise _bad(field, f"expected a schema of at most {MAX_DEPTH} levels, found {depth}")
        wrong = await asyncio.to_thread(what_is_wrong, json.dumps(schema, sort_keys=True))
        if wrong is not None:
            raise _bad(field, f"expected a JSON schema, found {wrong}")


def schemas(tools: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find the schemas and say where they are: chat completions, responses and messages have a place each."""
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict):
            continue
        function = tool.get("function")
        places = {
            "function.parameters": function.get("parameters") if isinstance(function, dict) else None,
            "parameters": tool.get("parameters"),
            "input_schema": tool.get("input_schema"),
        }
        for place, schema in places.items():
            if isinstance(schema, dict):
                yield f"tools[{i}].{place}", schema


@lru_cache(_REMEMBERED)
def what_is_wrong(text: str) -> str | None:
    """Check one schema against its draft, or, where it names none, against the drafts that are in use.

    Args:
        text: the schema as JSON.

    Returns:
        Where and what, by the newest draft; None if it is a schema.
    """
    schema = json.loads(text)
    named = validator_for(schema, default=None)
    found = None
    for draft in _DRAFTS if named is None else (named,):
        try:
            draft.check_schema(schema)
        except SchemaError as error:
            where = ".".join(map(str, error.path)) or "the schema"
            found = found or f"{where} wrong: {error.message}"
        else:
            return None
    return found


def measure(value: Any) -> tuple[int, int]:
    """Count the objects and lists in a JSON value, and their levels."""
    nodes, depth, level = 0, 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        nodes += len(level)
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return nodes, depth


def _bad(field: str, message: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, "tools", f"{field}: {message}.", field)
