"""Ready while tokens come, healthy while the engine moves, and what a server that stops waits for."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("vllm")

from pifa_vllm_server import readiness
from pifa_vllm_server.readiness import Readiness
from pifa_vllm_server.settings import ServerSettings


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    """The processes of this machine that are ranks of the engine."""
    found = []
    monkeypatch.setattr(readiness, "_of_this_machine", lambda pids: found)
    return found


class Engine:
    """It generates a token at once, or what a test makes of it."""

    def __init__(self):
        self.errored = False
        self.running = 0
        self.timeouts = []
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: self.running > 0)
        self.probed = 0
        self.failure: Exception | None = None
        self.hangs = False

    async def get_supported_tasks(self):
        return ("generate",)

    async def generate(self, prompt, sampling, request_id):
        self.probed += 1
        if self.failure is not None:
            raise self.failure
        while self.hangs:
            await asyncio.sleep(0.01)
        yield None

    def shutdown(self, timeout=None):
        self.timeouts.append(timeout)


class Gauges:
    """Takes what the metrics are told."""

    def __init__(self):
        self.said = {}

    def __getattr__(self, name):
        return SimpleNamespace(
            set=lambda value: self.said.__setitem__(name, value),
            labels=lambda label: SimpleNamespace(
                inc=lambda: self.said.__setitem__(label, self.said.get(label, 0) + 1)
            ),
        )


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def gauges():
    return Gauges()


@pytest.fixture
def tokens(monkeypatch):
    """What vLLM's counter says."""
    counted = SimpleNamespace(value=0.0)
    monkeypatch.setattr(readiness, "_tokens_generated", lambda: counted.value)
    monkeypatch.setattr(readiness, "_TICK_SECONDS", 0.01)
    return counted


def watched(engine, gauges, workers=(), **settings):
    wanted = {"probe_interval": 0.2, "hang_timeout": 0.3, "token_timeout": 60.0, **settings}
    return Readiness(engine, ServerSettings(**wanted), gauges, list(workers))


def during(ready, case):
    async def run():
        watching = asyncio.create_task(ready.watch())
        try:
            await case()
        finally:
            watching.cancel()

    asyncio.run(run())


async def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_ready_with_the_first_token(engine, gauges, tokens):
    ready = watched(engine, gauges)
    assert ready.reason == "no token has been generated yet"
    assert ready.fatal is None

    async def case():
        await until(lambda: ready.reason is None)
        await until(lambda: gauges.said.get("ready") == 1)
        assert gauges.said["ready_seconds"] > 0
        assert gauges.said["ok"] >= 1

    during(ready, case)


def test_users_tokens_make_probes_needless_and_heal(engine, gauges, tokens):
    ready = watched(engine, gauges)
    engine.failure = RuntimeError("no")

    async def case():
        await until(lambda: ready.reason == "generating a token failed (RuntimeError: no)")
        assert gauges.said["failed"] >= 1
        tokens.value += 1
        await until(lambda: ready.reason is None)
        probed = engine.probed
        for _ in range(30):
            tokens.value += 1
            await asyncio.sleep(0.02)
        assert engine.probed == probed

    during(ready, case)


def test_a_full_queue_is_no_illness(engine, gauges, tokens):
    ready = watched(engine, gauges)

    async def case():
        await until(lambda: ready.reason is None)
        engine.failure = RuntimeError("busy")
        engine.failure.http_status = 503
        await until(lambda: gauges.said.get("failed", 0) > 1)
        assert ready.reason is None

    during(ready, case)


def test_an_engine_that_stands_still_hangs(engine, gauges, tokens, monkeypatch):
    used = SimpleNamespace(user=0.0, system=0.0)
    monkeypatch.setattr(readiness.psutil, "Process", lambda pid: SimpleNamespace(cpu_times=lambda: used))
    ready = watched(engine, gauges, [{"engine": 0, "pid": 1}])

    async def case():
        await until(lambda: ready.reason is None)
        engine.hangs = True
        began = time.monotonic()
        await until(lambda: ready.fatal is not None)
        assert time.monotonic() - began > 0.4
        assert "the engine hangs" in ready.fatal
        assert ready.reason == ready.fatal
        # It moves again.
        engine.hangs = False
        await until(lambda: ready.reason is None and ready.fatal is None)

    during(ready, case)


def test_an_engine_that_computes_does_not(engine, gauges, tokens, monkeypatch):
    """Such as over a long prompt on a CPU; but not for ever."""
    monkeypatch.setattr(
        readiness.psutil,
        "Process",
        lambda pid: SimpleNamespace(
            cpu_times=lambda: SimpleNamespace(user=10 * time.monotonic(), system=0.0)
        ),
    )
    ready = watched(engine, gauges, [{"engine": 0, "pid": 1}], token_timeout=1.5)

    async def case():
        await until(lambda: ready.reason is None)
        engine.hangs = True
        began = time.monotonic()
        while time.monotonic() - began < 1.2:
            assert ready.reason is None
            await asyncio.sleep(0.02)
        await until(lambda: ready.fatal is not None)
        assert "has generated nothing for" in ready.fatal

    during(ready, case)


def test_every_rank_of_one_engine_must_move(engine, gauges, tokens, monkeypatch):
    moving = {1, 2, 3}

    def process(pid):
        used = 10 * time.monotonic() if pid in moving else 0.0
        return SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=used, system=0.0))

    monkeypatch.setattr(readiness.psutil, "Process", process)
    ready = watched(engine, gauges, [{"engine": pid // 2, "pid": pid} for pid in range(4)])
    ready._working()
    for moves, works in (((0, 1), True), ((2, 3), True), ((0, 3), False), ((), False)):
        moving.clear()
        ready._working()
        moving.update(moves)
        ready._working()
        time.sleep(0.01)
        assert ready._working() is works


def test_a_dead_engine_is_fatal(engine, gauges, tokens):
    ready = watched(engine, gauges)
    engine.errored = True
    assert ready.reason == ready.fatal == "the engine has failed"


def test_the_engine_outlives_what_is_worked_on(engine, gauges, tokens):
    ready = watched(engine, gauges)
    engine.running = 1
    stopping = threading.Thread(target=engine.shutdown, kwargs={"timeout": 60.0})
    stopping.start()
    while not ready.stopping:
        time.sleep(0.01)
    assert ready.reason == "the server is stopping"
    assert ready.fatal is None
    time.sleep(1.5)
    assert engine.timeouts == []
    engine.running = 0
    stopping.join(60)
    assert len(engine.timeouts) == 1
    assert 5.0 <= engine.timeouts[0] <= 60.0


def test_it_does_not_wait_for_ever(engine, gauges, tokens):
    watched(engine, gauges)
    engine.running = 1
    engine.shutdown(timeout=0.2)
    engine.shutdown(timeout=None)
    assert len(engine.timeouts) == 2


def test_a_rank_whose_process_has_ended_is_told_at_once(ranks, engine, gauges):
    process = subprocess.Popen(["sleep", "60"])
    ranks.append(psutil.Process(process.pid))
    ready = watched(engine, gauges)
    assert ready.fatal is None
    process.kill()
    while ranks[0].status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert ready.fatal == "the process of a rank has ended"
    process.wait()
    assert ready.reason == "the process of a rank has ended"
