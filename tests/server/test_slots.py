"""A server that stops waits for what it works on, and does not say that its engine died."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.slots import Slots
from vllm.v1.engine.exceptions import EngineDeadError

VLLM = logging.getLogger("vllm.v1.engine.async_llm")


class Engine:
    """It says what vLLM's says, whether it is stopped or dies."""

    def __init__(self):
        self.timeouts = []

    def shutdown(self, timeout):
        self.timeouts.append(timeout)
        self.fail(EngineDeadError())

    def fail(self, error):
        try:
            raise error
        except Exception:
            VLLM.exception("AsyncLLM output_handler failed.")


@pytest.fixture
def slots():
    gauge = SimpleNamespace(set=lambda value: None)
    return Slots(2, SimpleNamespace(active=gauge, active_limit=gauge, ready=gauge))


@pytest.fixture
def logged(monkeypatch):
    """What vLLM logs of its engine; whatever filters a test adds are gone afterwards."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(type(record.exc_info[1]).__name__)
    monkeypatch.setattr(VLLM, "filters", [])
    monkeypatch.setattr(VLLM, "handlers", [handler])
    monkeypatch.setattr(VLLM, "propagate", False)
    return lines


def test_only_an_engine_that_was_not_stopped_is_logged_as_dead(slots, logged):
    engine = Engine()
    slots.drain_before_stop(engine)
    engine.fail(EngineDeadError())
    assert logged == ["EngineDeadError"]
    engine.shutdown(timeout=1.0)
    engine.shutdown(timeout=None)
    assert logged == ["EngineDeadError"]
    engine.fail(RuntimeError())
    assert logged == ["EngineDeadError", "RuntimeError"]


def test_the_engine_outlives_what_is_worked_on(slots, logged):
    engine = Engine()
    slots.drain_before_stop(engine)
    stopping = threading.Thread(target=engine.shutdown, kwargs={"timeout": 60.0})
    with slots.take():
        stopping.start()
        while not slots.closed:
            time.sleep(0.01)
        with pytest.raises(RefusedError, match="stopping"), slots.take():
            pass
        assert engine.timeouts == []
    stopping.join(60)
    assert len(engine.timeouts) == 1
    assert 5.0 <= engine.timeouts[0] <= 60.0


def test_it_does_not_wait_for_ever(slots, logged):
    engine = Engine()
    slots.drain_before_stop(engine)
    with slots.take():
        engine.shutdown(timeout=0.2)
    assert len(engine.timeouts) == 1
