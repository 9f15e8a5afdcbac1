"""Half an hour of mixed load leaves nothing behind (`make test-long`)."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.hostile import fuzzed, own_failures
from tests.server.serving import serve
from tests.server.soak import ENVIRONMENT, FLAGS, soak

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(checkpoint, log, *FLAGS, **ENVIRONMENT) as running:
        yield running


def test_half_an_hour(server):
    found = soak(server, 1800)
    assert found["the fixed prompt's output is the same"]
    assert {name for name in found["outcomes"] if name.startswith("5")} <= {"503"}
    assert found["growth after the warm-up"]["resident MB"] < 64
    assert found["growth after the warm-up"]["file descriptors"] <= 8
    assert found["growth after the warm-up"]["threads"] <= 4
    assert own_failures(server.log.read_text()) == []


def test_two_thousand_fuzzed_requests(server):
    found = fuzzed(server.url, 2000)
    assert found["requests"] >= 2000
    # What else is an error of the server is vLLM's own (results/README.md).
    assert own_failures(server.log.read_text()) == []
