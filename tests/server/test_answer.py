"""What became of a request, as the layer around vLLM's app sees it."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette")

from pifa_vllm_server.answer import Answer

START = {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"id-1")]}


def pieces(*bodies):
    last = len(bodies) - 1
    return [{"type": "http.response.body", "body": b, "more_body": i < last} for i, b in enumerate(bodies)]


def passed(messages, *, leaves=False):
    """An answer through which an app sends messages, and what the HTTP server gets of them."""
    got: list[dict] = []

    async def send(message):
        got.append(message)

    async def receive():
        return {"type": "http.disconnect"}

    async def run():
        answer = Answer(receive, send)
        if leaves:
            await answer.receive()
        for message in messages:
            await answer.send(message)
        await answer.receive()
        return answer

    answer = asyncio.run(run())
    assert got == messages
    return answer


def test_an_answer_passes_unchanged():
    answer = passed([START, *pieces(b"data: {}\n\n", b"data: [DONE]\n\n")])
    assert (answer.outcome, answer.request_id, answer.started) == (200, "id-1", True)


@pytest.mark.parametrize(
    "event",
    [b'data: {"error": {"code": 500}}\n\n', b'data: {"error":{}}\n\n', b"event: error\ndata: {}\n\n"],
)
def test_an_error_in_a_stream_counts_as_one(event):
    assert passed([START, *pieces(b"data: {}\n\n", event, b"data: [DONE]\n\n")]).outcome == 500


def test_text_about_errors_is_none():
    assert passed([START, *pieces(b'data: {"text": "data: {\\"error\\""}\n\n', b"")]).outcome == 200


def test_a_client_that_leaves():
    assert passed([START, *pieces(b"data: {}\n\n")[:0]], leaves=True).outcome == 499
    # A connection that ends after the answer is no client that left.
    assert passed([START, *pieces(b"")]).outcome == 200


def test_no_answer_is_an_error():
    answer = passed([], leaves=False)
    assert not answer.started
    answer.client_gone = False
    assert answer.outcome == 500
