"""A server under test, started as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from pifa_vllm.served import free_port

START_SECONDS = 1500


class Server:
    """`pifa-vllm serve` in processes of its own.

    Args:
        directory: the checkpoint.
        log: file for its output.
        flags: of the command.
        environment: variables beside the usual ones.
    """

    def __init__(self, directory: Path, log: Path, *flags: str, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "pifa_vllm", "serve", str(directory), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--enforce-eager", "--served-model-name", "tiny", *flags]
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **environment}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **variables}
            )

    def wait(self) -> None:
        """Return when it is ready; fail with its log when it ends, or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.3)

    def stop(self, seconds: float = 120, family_seconds: float = 30) -> int:
        """Ask it to stop, see that it and its processes do in time, and return its exit code."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        assert family  # vLLM's engine runs in processes of its own
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        _, alive = psutil.wait_procs(family, timeout=family_seconds)
        assert not alive
        return code

    def resident(self) -> int:
        """Bytes resident in all of its processes."""
        root = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])

    def metrics(self, **headers: str) -> Metrics:
        """What /metrics says now."""
        response = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60)
        assert response.status_code == 200
        return Metrics(response.text)


@contextmanager
def serve(directory: Path, log: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server for a fixture: ready, and stopped in order afterwards; arguments as for `Server`."""
    running = Server(directory, log, *flags, **environment)
    try:
        running.wait()
        yield running
        assert running.stop(60, 20) == 0
    finally:
        running.process.kill()


def save_tiny_checkpoint(root: Path) -> None:
    """A PIFA checkpoint at root / "pifa", all of its modules compressed."""
    from tests.pifa_tiny import save_pifa_twin
    from tests.tiny import save_tiny_model

    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=lambda _, m, n: min(m, n) // 2)


class Metrics:
    """Prometheus' text format, read by Prometheus' own client."""

    def __init__(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum a metric over the series whose labels fit."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no series {name} {labels}"
        return sum(found)

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of each series."""
        return [sample.labels for sample in self.samples if sample.name == name]


def chat(url: str, **fields: Any) -> httpx.Response:
    """Ask for a few tokens; `fields` replace those of the request."""
    request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=request, timeout=120)


def assert_openai_error(response: httpx.Response, status: int, message: str = "") -> None:
    """Check status, shape and message of an error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] == status
    assert "param" in error
    assert re.search(message, error["message"]), error["message"]
