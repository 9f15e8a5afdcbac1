"""The comparison with bare vLLM: its arithmetic, and what the committed result says."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

pytest.importorskip("httpx")
pytest.importorskip("pydantic_settings")

from pifa_vllm_server.overhead import cpu_seconds, summarize

ROOT = Path(__file__).parents[2] / "server"


def measured(ttft, request_cpu, rates, round_cpu):
    return {
        "ttft_seconds": ttft,
        "request_cpu_seconds": request_cpu,
        "tokens_per_second": rates,
        "round_cpu_seconds": round_cpu,
    }


def test_pairs_are_compared():
    found = {
        "pifa-vllm": measured(
            [0.011, 0.021, 0.031], [0.01, 0.0, 0.02], [99.0, 198.0, 297.0], [0.12, 0.12, 0.15]
        ),
        "vllm": measured([0.010, 0.020, 0.030], [0.01, 0.0, 0.014], [100.0, 200.0, 300.0], [0.1, 0.1, 0.16]),
    }
    summary = summarize(found, 100)
    assert summary["ttft_added_seconds"] == pytest.approx(0.001)
    assert summary["throughput_ratio"] == pytest.approx(0.99)
    assert summary["tokens_per_second"] == {"pifa-vllm": 198.0, "vllm": 200.0}
    assert summary["cpu_added_seconds_per_request"] == pytest.approx(0.002)
    assert summary["cpu_added_seconds_per_token"] == pytest.approx(0.0001)
    # 0.01 s of rounds that took 100 tokens at these rates.
    assert summary["cpu_added_share"] == pytest.approx(0.01 / ((1 / 0.99 + 1 / 1.98 + 1 / 2.97) / 3))


def test_cpu_time_is_this_process_and_grows():
    process = psutil.Process()
    before = cpu_seconds(process)
    while cpu_seconds(process) < before + 0.02:
        sum(range(10_000))


def test_readme_gives_the_committed_result():
    path, text = ROOT / "results" / "overhead.json", (ROOT / "README.md").read_text()
    if not path.exists():
        assert "Not yet measured" in text
        return
    report = json.loads(path.read_text())
    summary = report["summary"]
    assert summarize(report["measured"], report["at_once"] * report["tokens"]) == summary
    assert f"{summary['ttft_added_seconds'] * 1e3:+.2f} ms" in text
    assert f"{(summary['throughput_ratio'] - 1) * 100:+.2f} %" in text
    assert f"{summary['cpu_added_seconds_per_request'] * 1e3:.2f} ms of CPU time" in text
    assert f"{summary['cpu_added_seconds_per_token'] * 1e6:.0f} µs a token" in text
    assert f"{summary['cpu_added_share'] * 100:.2f} % of one core" in text
