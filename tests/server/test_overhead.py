"""The comparison with bare vLLM: its arithmetic, and what the committed result says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("pydantic_settings")

from pifa_vllm_server.overhead import summarize

ROOT = Path(__file__).parents[2] / "server"


def test_pairs_are_compared():
    found = {
        "pifa-vllm": {"ttft_seconds": [0.011, 0.021, 0.031], "tokens_per_second": [99.0, 198.0, 297.0]},
        "vllm": {"ttft_seconds": [0.010, 0.020, 0.030], "tokens_per_second": [100.0, 200.0, 300.0]},
    }
    summary = summarize(found)
    assert summary["ttft_added_seconds"] == pytest.approx(0.001)
    assert summary["throughput_ratio"] == pytest.approx(0.99)
    assert summary["tokens_per_second"] == {"pifa-vllm": 198.0, "vllm": 200.0}


def test_readme_gives_the_committed_result():
    path, text = ROOT / "results" / "overhead.json", (ROOT / "README.md").read_text()
    if not path.exists():
        assert "Not yet measured" in text
        return
    report = json.loads(path.read_text())
    summary = report["summary"]
    assert summarize(report["measured"]) == summary
    assert f"{summary['ttft_added_seconds'] * 1e3:+.2f} ms" in text
    assert f"{(summary['throughput_ratio'] - 1) * 100:+.2f} %" in text
