"""One tiny checkpoint, and one server on it, for all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pifa_tiny import save_pifa_twin
from tests.server.serving import Server
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PIFA checkpoint whose k_proj stay dense, in float32."""
    root = tmp_path_factory.mktemp("served")
    # vLLM's CPU attention takes head sizes from 32 on.
    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(
        root / "dense",
        root / "pifa",
        root / "twin",
        ranks=lambda name, m, n: None if name.endswith("k_proj") else min(m, n) // 2,
    )
    return root / "pifa"


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a key, with a limit on requests that tests can reach."""
    running = Server(
        checkpoint,
        tmp_path_factory.mktemp("log") / "server.log",
        *("--max-model-len", "256", "--server.max-concurrent-requests", "48"),
        *("--server.ready-interval", "2", "--server.request-timeout", "60"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--tool-strict-level", "parameter"),
        # A random model would fill its answer with spaces.
        *("--structured-outputs-config.backend", "xgrammar"),
        *("--structured-outputs-config.disable_any_whitespace", "true"),
    )
    try:
        running.wait()
        yield running
        assert running.stop() == 0
    finally:
        running.process.kill()
