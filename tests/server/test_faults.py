"""What becomes of a server to which something happens. `tests/server/results/faults.json` has the times."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.faults import (
    FLAGS,
    SMALL_CACHE,
    full_kv_cache,
    full_log_disk,
    hung_engine,
    killed,
    port_in_use,
    sigterm_under_load,
)
from tests.server.serving import Server

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def small(checkpoint, tmp_path_factory):
    """A server whose KV cache is too small; the last test stops it."""
    server = Server(checkpoint, tmp_path_factory.mktemp("log") / "server.log", *FLAGS, *SMALL_CACHE)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()


def test_a_hung_engine_is_found_within_a_minute(small):
    found = hung_engine(small)
    assert "the engine hangs" in found["ready says"]


def test_a_full_kv_cache_makes_requests_wait(small):
    found = full_kv_cache(small)
    assert found["preemptions"] > 0
    assert found["ready"] == 200
    assert found["lost"] == 0


def test_a_client_that_does_not_read_does_not_hold_the_server(small):
    found = sigterm_under_load(small)
    assert found["exit code"] == 0
    assert found["lost"] == 0
    assert set(found["late requests"]) <= {"503"}
    # vLLM's task that reads outputs may see the engine's orderly end before it is cancelled, and log it as a death.
    lines = [x for x in small.log.read_text().splitlines() if "[async_llm.py:" not in x]
    assert not [x for x in lines if "Traceback" in x]


def test_a_full_log_disk_stops_nothing_and_a_killed_engine_ends_the_server(checkpoint, tmp_path):
    server = Server(checkpoint, tmp_path / "server.log", *FLAGS)
    try:
        server.wait()
        full = full_log_disk(server)
        found = killed(server, "EngineCore")
    finally:
        server.process.kill()
    assert (full["lost"], full["bytes logged since"], full["ready"]) == (0, 0, 200)
    assert not found["outcomes"].get("ReadTimeout")
    assert sum(found["outcomes"].values()) == 4


def test_a_rank_that_is_killed_ends_the_server(checkpoint, tmp_path):
    server = Server(checkpoint, tmp_path / "server.log", *FLAGS, "--tensor-parallel-size", "2")
    try:
        server.wait()
        found = killed(server, "Worker")
    finally:
        server.process.kill()
    assert not found["outcomes"].get("ReadTimeout")
    assert sum(found["outcomes"].values()) == 4


def test_a_port_that_is_taken_is_named(checkpoint, tmp_path):
    found = port_in_use(checkpoint, tmp_path / "server.log")
    assert found["exit code"] == 1
    assert found["last line"].startswith("error: --port: expected a free one, found")
