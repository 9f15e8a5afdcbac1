"""Tools whose parameters are no JSON schemas, or schemas that would keep the server busy."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette")
pytest.importorskip("jsonschema")

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.tools import MAX_DEPTH, MAX_NODES, check_tools, measure


def check(*parameters):
    tools = [{"type": "function", "function": {"name": "f", "parameters": item}} for item in parameters]
    asyncio.run(check_tools(tools))


def nested(levels):
    schema: dict = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def test_tools_have_schemas():
    check({"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]})
    check({})
    check("vLLM says that this is none")
    for parameters in ({"type": "no such type"}, {"properties": []}, {"required": "a"}):
        with pytest.raises(
            RefusedError, match=r"tools\[1\].function.parameters: expected a JSON schema"
        ) as caught:
            check({}, parameters)
        assert (caught.value.status, caught.value.param) == (400, "tools[1].function.parameters")
    for tools in (None, 5, [5], [{}], [{"function": 5}]):
        asyncio.run(check_tools(tools))


@pytest.mark.parametrize("place", ["parameters", "input_schema"])
def test_tools_of_the_other_apis_too(place):
    with pytest.raises(RefusedError, match=rf"tools\[0\].{place}: .* found type wrong"):
        asyncio.run(check_tools([{"name": "f", place: {"type": "no such type"}}]))


def test_older_drafts_are_schemas_too():
    pair = {"type": "array", "items": [{"type": "string"}, {"type": "integer"}]}
    check(pair)
    check({**pair, "$schema": "http://json-schema.org/draft-07/schema#"})
    check({"type": "number", "minimum": 0, "exclusiveMinimum": True})
    with pytest.raises(RefusedError, match="items wrong"):
        check({**pair, "$schema": "https://json-schema.org/draft/2020-12/schema"})


def test_schemas_are_limited_in_size_and_depth():
    check(nested(MAX_DEPTH))
    with pytest.raises(RefusedError, match=f"at most {MAX_DEPTH} levels, found {MAX_DEPTH + 1}"):
        check(nested(MAX_DEPTH + 1))
    # As deep as Python's parser lets it be.
    with pytest.raises(RefusedError, match="at most"):
        check(nested(900))
    half = {"anyOf": [{}] * (MAX_NODES // 2)}
    with pytest.raises(RefusedError, match=rf"tools\[1\].*at most {MAX_NODES} objects and lists"):
        check(half, half)


def test_nodes_and_levels_are_counted():
    assert measure({"a": [1, {"b": []}], "c": {}}) == (5, 4)
    assert measure("text") == (0, 0)


def test_others_are_served_while_a_schema_is_checked():
    ticks = 0

    async def case():
        nonlocal ticks
        work = asyncio.ensure_future(
            check_tools([{"parameters": {"anyOf": [{"title": str(i)} for i in range(2000)]}}])
        )
        while not work.done():
            await asyncio.sleep(0)
            ticks += 1
        await work

    asyncio.run(case())
    assert ticks > 10
