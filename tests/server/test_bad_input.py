"""What a server must survive: each refusal is OpenAI-shaped, and the next good request succeeds."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time

import httpx
import pytest

pytest.importorskip("vllm")

from tests.server.serving import assert_openai_error, chat

pytestmark = pytest.mark.vllm

COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}


@pytest.fixture(autouse=True)
def _next_good_request_succeeds(server):
    yield
    assert chat(server.url).status_code == 200
    assert server.process.poll() is None


def complete(server, **fields):
    return httpx.post(f"{server.url}/v1/completions", json={**COMPLETION, **fields}, timeout=120)


MALFORMED = {
    "cut short": b"{",
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "no value": b'{"model": "tiny", "prompt": }',
    "not UTF-8": b"\xff\xfe{}",
    "a broken character": b'{"model": "tiny", "prompt": "\xc3\x28"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_malformed_json_and_utf8(server, path, body):
    response = httpx.post(
        f"{server.url}{path}", content=body, headers={"Content-Type": "application/json"}, timeout=120
    )
    assert_openai_error(response, 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "Hi"},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"content": "no role"}]},
        {"max_tokens": "many"},
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 7},
        {"stream": "perhaps"},
        {"n": "two"},
        {"n": 0},
        {"logit_bias": {"no number": 1}},
    ],
)
def test_wrong_types_and_values(server, fields):
    assert_openai_error(chat(server.url, **fields), 400)


def test_unknown_model_and_route(server):
    assert_openai_error(chat(server.url, model="another"), 404, "another")
    assert_openai_error(httpx.get(f"{server.url}/v1/nothing"), 404)
    assert_openai_error(httpx.get(f"{server.url}/v1/chat/completions"), 405)


def test_context_overflow(server):
    assert_openai_error(complete(server, prompt="word " * 300), 400, "256")
    assert_openai_error(complete(server, max_tokens=100_000), 400, "max_tokens|context")


def test_huge_n(server):
    assert_openai_error(complete(server, n=17), 400, "16")
    # More than may queue is not even looked at.
    assert_openai_error(complete(server, n=10**6), 503, "busy")


def test_more_prompts_than_may_queue(server):
    # As many answers as have room are generated, or none.
    assert_openai_error(complete(server, prompt=["Hi"] * 65), 503, "busy")


def test_prompt_of_ten_megabytes(server):
    assert_openai_error(complete(server, prompt="a" * 10_000_000), 413, "at most 4194304 bytes")
    # The same without an announced length.
    pieces = (b"a" * 100_000 for _ in range(100))
    assert_openai_error(httpx.post(f"{server.url}/v1/completions", content=pieces, timeout=60), 413)
    # Below the limit on bodies, above that of the model.
    assert_openai_error(complete(server, prompt="a" * 1_500_000), 400, "context length is 256")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": "f"},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "none"}}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "another"}}},
        {
            "tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "no such type"}}}],
            "tool_choice": "required",
        },
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": 5}}}},
        {"response_format": {"type": "poem"}},
    ],
)
def test_tool_and_answer_schemas_that_are_none(server, fields):
    assert_openai_error(chat(server.url, **fields), 400)


def running(server):
    return server.metrics().total("vllm:num_requests_running")


def wait_until_idle(server):
    deadline = time.monotonic() + 60
    while running(server) or server.metrics().total("vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_connections_dropped_in_a_stream_free_their_slots(server):
    request = {**COMPLETION, "max_tokens": 250, "stream": True, "ignore_eos": True}
    before = server.metrics().total("vllm:request_success_total", finished_reason="length")
    for _ in range(8):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=60) as response:
            next(response.iter_lines())
    # And one that does not wait for a single byte.
    body = json.dumps({**request, "stream": False}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
    wait_until_idle(server)
    # They did not run to their end unseen.
    assert server.metrics().total("vllm:request_success_total", finished_reason="length") < before + 9
    assert server.log.read_text().count(" 499 in ") >= 1


def test_two_hundred_clients_at_once(server):
    limits = httpx.Limits(max_connections=None)

    async def ask(client, i):
        request = {**COMPLETION, "prompt": f"client {i}", "max_tokens": 4}
        return await client.post(f"{server.url}/v1/completions", json=request)

    async def ask_all():
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(200)))

    asyncio.run(ask_all())  # what grows with the first crowd stays, such as threads and buffers
    gc.collect()
    before = server.resident()
    responses = asyncio.run(ask_all())
    answered = [response for response in responses if response.status_code == 200]
    others = [response for response in responses if response.status_code != 200]
    # Twice --max-num-seqs run or wait; the rest comes in while they do.
    assert len(answered) >= 32
    for response in others:
        assert_openai_error(response, 503, "busy")
    wait_until_idle(server)
    assert server.resident() - before < 32 << 20
