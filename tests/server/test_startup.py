"""What the log says while a server starts, and when it stops saying it."""

import logging
import time

import pytest
from pifa_vllm_server import startup


@pytest.fixture
def said(caplog, monkeypatch):
    # vLLM's loggers do not hand on what they log, where vLLM has been imported.
    monkeypatch.setattr(startup.logger, "propagate", True)
    monkeypatch.setattr(startup.logger, "disabled", False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(startup, "_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(startup, "resident_by_role", lambda roles: {"engine": 3_000_000_000})
    monkeypatch.setenv(startup._STARTED, "0")
    with caplog.at_level(logging.INFO, "vllm.pifa_vllm_server"):
        yield lambda: [record.getMessage() for record in caplog.records]


def fail():
    time.sleep(0.1)  # the next line is being made up
    raise RuntimeError


def wait_for(said, count):
    deadline = time.monotonic() + 30
    while len(said()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_says_so_until_it_is_ready(said):
    with startup.told("some/model") as done:
        wait_for(said, 3)
        done.set()
        assert said()[0].startswith("starting: some/model.")
        assert "still starting after 0 s, 3.0 GB resident" in said()
        time.sleep(0.1)  # one that was on its way
        count = len(said())
        time.sleep(0.2)
        assert len(said()) == count


def test_an_error_has_the_last_word(said, monkeypatch):
    def slow(roles):
        time.sleep(0.2)
        return {}

    monkeypatch.setattr(startup, "resident_by_role", slow)
    with pytest.raises(RuntimeError), startup.told("some/model"):
        fail()
    count = len(said())
    time.sleep(0.5)
    assert len(said()) == count
    assert time.time() - startup.started_at() < 60
