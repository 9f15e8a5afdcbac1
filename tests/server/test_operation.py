"""Two API server processes, two ranks, a key and JSON logs: what an operator relies on."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest

pytest.importorskip("vllm")

from pifa_vllm.checkpoint import Shards, read_json
from tests.release import vllm_before
from tests.server.serving import Server, assert_openai_error, chat

pytestmark = pytest.mark.vllm

KEY = {"Authorization": "Bearer secret-of-the-test"}
PARTS = ("total", "weights", "kv_cache", "other")
PROMPT = "a prompt that is nobody's business"


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory):
    running = Server(
        checkpoint,
        tmp_path_factory.mktemp("log") / "server.log",
        *("--api-server-count", "2", "--tensor-parallel-size", "2", "--max-model-len", "512"),
        *("--api-key", KEY["Authorization"].removeprefix("Bearer ")),
        *("--server.probe-interval", "1000", "--shutdown-timeout", "20"),
        PIFA_SERVER_LOG_FORMAT="text" if vllm_before("0.32") else "json",
    )
    try:
        running.wait()
        yield running
    finally:
        running.process.kill()


def post(server, **fields):
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=request, headers=KEY, timeout=120)


def logged(server):
    """The log's lines about requests, as objects."""
    found = []
    for line in server.log.read_text().splitlines():
        if line.startswith("{") and '"request_id"' in line:
            found.append(json.loads(line))
    return found


def test_the_key_guards_the_running_server(pair):
    for path in ("/metrics", "/v1/models", "/pifa/info", "/dashboard", "/docs", "/openapi.json", "/load"):
        assert_openai_error(httpx.get(f"{pair.url}{path}", timeout=60), 401, "API key")
        assert httpx.get(f"{pair.url}{path}", headers=KEY, timeout=60).status_code == 200
    assert_openai_error(chat(pair.url), 401)
    for path in ("/health", "/ready"):
        assert httpx.get(f"{pair.url}{path}", timeout=60).status_code == 200
    assert_openai_error(httpx.post(f"{pair.url}/scale_elastic_ep", headers=KEY, timeout=60), 404)
    # What a browser sends after it has asked for the key.
    page = httpx.get(f"{pair.url}/dashboard", auth=("me", "secret-of-the-test"), timeout=60)
    assert page.status_code == 200
    models = httpx.get(f"{pair.url}/v1/models", auth=("me", "secret-of-the-test"), timeout=60)
    assert models.json()["data"][0]["id"] == "tiny"


def test_metrics_are_those_of_all_processes(pair):
    before = pair.metrics(**KEY)
    for _ in range(12):  # each on a connection of its own, so both processes get some
        assert post(pair).status_code == 200
    values = set()
    for _ in range(6):
        metrics = pair.metrics(**KEY)
        values.add(metrics.total("vllm:generation_tokens_total"))
    assert values == {before.total("vllm:generation_tokens_total") + 36}
    assert len(metrics.labels("pifa_density_ratio")) == 1
    assert metrics.total("pifa_ready") == 1
    assert metrics.total("pifa_device_memory_bytes", part="kv_cache") == metrics.total("pifa_kv_cache_bytes")
    assert metrics.total("pifa_process_resident_bytes") == pytest.approx(pair.resident(), rel=0.1)
    assert metrics.total("pifa_process_resident_bytes", role="other") < 100e6


def test_metrics_are_those_of_all_ranks(pair, checkpoint):
    metrics = pair.metrics(**KEY)
    served = sum(entry.nbytes for entry in Shards(checkpoint).entries.values())
    assert metrics.total("pifa_weight_bytes", form="compressed") == served
    by_rank = [
        {part: metrics.total("pifa_device_memory_bytes", engine="0", rank=r, part=part) for part in PARTS}
        for r in ("0", "1")
    ]
    assert len(metrics.labels("pifa_device_memory_bytes")) == 2 * len(PARTS)
    for rank in by_rank:
        # Half of what is split; norms, and tables that no checkpoint has, are each rank's own.
        assert 0.5 * served <= rank["weights"] < 0.7 * served
        assert rank["weights"] + rank["kv_cache"] + rank["other"] <= rank["total"]
    tokens = metrics.total("pifa_kv_cache_tokens")
    config = read_json(checkpoint / "config.json")
    heads, size, layers = (config[k] for k in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    # Of two heads each rank keeps one.
    assert metrics.total("pifa_kv_cache_bytes") == tokens * 2 * heads * size * 4 * layers
    assert metrics.total("pifa_process_resident_bytes", role="worker") > 200e6


@pytest.mark.skipif(vllm_before("0.32"), reason="--logging-config.formatter is new in 0.32")
def test_logs_are_json_with_ids_and_without_prompts(pair):
    assert post(pair, user="x").headers["x-request-id"]
    sent = {**KEY, "X-Request-Id": "an-id-of-the-client"}
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
    answer = httpx.post(f"{pair.url}/v1/completions?q={PROMPT}", json=request, headers=sent, timeout=60)
    assert answer.headers["x-request-id"] == "an-id-of-the-client"
    assert "an-id-of-the-client" in answer.json()["id"]
    deadline = time.monotonic() + 60
    # The line is written once the answer has gone.
    while not (found := [line for line in logged(pair) if line["request_id"] == "an-id-of-the-client"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (line,) = found
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["seconds"] > 0
    # An id that could forge a line of the log is not written.
    assert httpx.get(f"{pair.url}/v1/models", headers={**KEY, "X-Request-Id": "a b{"}, timeout=60).is_success
    text = pair.log.read_text()
    assert "a b{" not in text
    assert PROMPT not in text
    assert "secret-of-the-test" not in text
    lines = [line for line in text.splitlines() if line.startswith("{")]
    assert all(json.loads(line)["levelname"] for line in lines)
    assert any("starting" in line for line in lines)


def test_methods_that_a_route_does_not_have(pair):
    """The eight first tests of the review, on a running server: OPTIONS /metrics gave every metric to anybody."""
    for path in ("/metrics", "/metrics/", "/metricsx", "/v1/models", "/dashboard", "/v1/completions"):
        for method in ("OPTIONS", "HEAD", "PUT", "GET", "POST", "TRACE"):
            response = httpx.request(method, f"{pair.url}{path}", timeout=60)
            assert response.status_code in (401, 404, 405), (method, path)
            assert "vllm:" not in response.text
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "GET"}
    assert "vllm:" not in httpx.options(f"{pair.url}/metrics", headers=asked, timeout=60).text
    for origin in ("http://[", "[", "http://a"):
        sent = {"Origin": origin, "Authorization": "Basic eDp5"}
        assert httpx.get(f"{pair.url}/v1/models", headers=sent, timeout=60).status_code == 401
    assert "Traceback" not in pair.log.read_text()


def test_sigterm_lets_running_requests_finish(pair):
    request = {"model": "tiny", "prompt": "Hi", "max_tokens": 120, "stream": True, "ignore_eos": True}
    codes: list[int] = []
    stopping = threading.Thread(target=lambda: codes.append(pair.stop()))
    with httpx.stream(
        "POST", f"{pair.url}/v1/completions", json=request, headers=KEY, timeout=120
    ) as response:
        lines = response.iter_lines()
        next(lines)
        stopping.start()
        late = set()
        while 503 not in late and stopping.is_alive():
            late.add(httpx.get(f"{pair.url}/ready", timeout=60).status_code)
        rest = list(lines)
    assert 503 in late
    assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
    assert sum(line.startswith("data: {") for line in rest) > 90
    stopping.join(120)
    assert codes == [0]
