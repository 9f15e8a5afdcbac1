"""How much JSON a request may hold."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette")

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.limits import check_values

CHAT = "/v1/chat/completions"


def refused(path, body, limit=100):
    with pytest.raises(RefusedError) as caught:
        check_values(path, body if isinstance(body, bytes) else json.dumps(body).encode(), limit)
    assert caught.value.status == 400
    return str(caught.value)


def passes(path, body, limit=100):
    check_values(path, json.dumps(body).encode(), limit)


@pytest.mark.parametrize("item", [[], {}, None, "a", 1, 1.5, True])
def test_lists_are_counted(item):
    passes(CHAT, {"messages": [item] * 99})
    assert "at most 100 values" in refused(CHAT, {"messages": [item] * 100})
    assert refused(CHAT, [item] * 101)
    assert refused(CHAT, {"a": {"b": [[item] * 50, [item] * 50]}})


def test_objects_are_counted():
    passes(CHAT, dict.fromkeys(map(str, range(100))))
    assert refused(CHAT, {"logit_bias": dict.fromkeys(map(str, range(100)))})


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/completions", "prompt"), ("/detokenize", "tokens"), ("/inference/v1/generate", "token_ids")],
)
def test_token_ids_are_not(path, name):
    passes(path, {name: list(range(1000))})
    assert refused(path, {name: [*range(1000), True]})
    assert refused(path, {name: [*range(1000), 1.5]})
    assert refused(path, {name: [*range(1000), -1]})
    assert refused(path, {"messages": list(range(1000))})


def test_token_ids_of_several_prompts():
    passes("/v1/completions", {"prompt": [[1] * 500] * 50})
    assert refused("/v1/completions", {"prompt": [[1] * 5] * 101})


def test_input_is_token_ids_where_it_is_pooled():
    passes("/v1/embeddings", {"input": [[1] * 500] * 50})
    assert refused("/v1/embeddings", {"input": ["a"] * 101})
    assert refused("/v1/responses", {"input": [1] * 101})


def test_entries_of_responses_weigh_more():
    passes("/v1/responses", {"input": [{}] * 3})
    assert refused("/v1/responses", {"input": [{}] * 4})


@pytest.mark.parametrize(
    "body",
    [b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"nothing", b'{"a":' + b"9" * 5000 + b"}"],
    ids=["cut short", "deep lists", "deep objects", "not UTF-8", "a word", "a huge number"],
)
def test_no_json(body):
    assert "Expected JSON, found none" in refused(CHAT, body)
