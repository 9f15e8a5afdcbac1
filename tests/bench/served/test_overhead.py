"""The comparison with bare vLLM: its arithmetic, and what the committed result says."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("httpx")
pytest.importorskip("pydantic_settings")

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.served.overhead import cpu_seconds, summarize
from pifa_vllm.cli import main
from pifa_vllm.served import ServerProcess

ROOT = Path(__file__).parents[3]


def measured(ttft, request_cpu, rates, token_cpu):
    return {
        "ttft_seconds": ttft,
        "request_cpu_seconds": request_cpu,
        "tokens_per_second": rates,
        "token_cpu_seconds": token_cpu,
    }


def test_pairs_are_compared_within_a_start_and_starts_averaged():
    first = {
        "pifa-vllm": measured([0.011, 0.021, 0.091], [0.012, 0.011, 0.02], [99.0, 198.0, 300.0], [0.12, 0.1]),
        "vllm": measured([0.010, 0.020, 0.030], [0.01, 0.01, 0.01], [100.0, 200.0, 300.0], [0.1, 0.1]),
    }
    second = {
        "pifa-vllm": measured([0.013], [0.014], [97.0], [0.13]),
        "vllm": measured([0.010], [0.010], [100.0], [0.1]),
    }
    summary = summarize([first, second])
    assert summary["ttft_added_seconds_by_start"] == pytest.approx([0.001, 0.003])
    assert summary["ttft_added_seconds"] == pytest.approx(0.002)
    assert summary["ttft_added_seconds_standard_error"] == pytest.approx(0.001)
    assert summary["throughput_ratio"] == pytest.approx((0.99 + 0.97) / 2)
    assert summary["tokens_per_second"] == {"pifa-vllm": 148.5, "vllm": 150.0}
    assert summary["cpu_added_seconds_per_request"] == pytest.approx(0.003)
    assert summary["cpu_added_seconds_per_token"] == pytest.approx(0.02)
    assert "ttft_added_seconds_standard_error" not in summarize([first])


def test_cpu_time_is_the_process_s_and_grows():
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) < before + 0.02:
        sum(range(10_000))
    # Of the whole process: what psutil says, whose clock goes in steps of 10 ms.
    times = psutil.Process().cpu_times()
    assert cpu_seconds(os.getpid()) <= times.user + times.system + 0.1


def test_a_halted_server_is_stopped_all_the_same(tmp_path):
    """It stands in for vLLM: a program that ends in order when it is asked to."""
    module = tmp_path / "stand_in.py"
    module.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('in order'), sys.exit(0)))\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    log = tmp_path / "log"
    environment = {"PYTHONPATH": str(tmp_path)}
    with ServerProcess(tmp_path, 1, log, [], environment=environment, module=["stand_in"]) as running:
        while "up" not in log.read_text():
            time.sleep(0.01)
        running.suspend()
        process = psutil.Process(running.pid)
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        running.resume()
        while process.status() == psutil.STATUS_STOPPED:
            time.sleep(0.01)
        running.suspend()
    assert log.read_text() == "up\nin order\n"


@pytest.mark.parametrize("flag", ["--starts", "--at-once"])
def test_nothing_to_measure_is_refused(flag, capsys):
    assert main(["bench", "overhead", "DIR", "--output", "o.json", flag, "0"]) == 1
    assert f"{flag}: expected 1 or more, found 0" in capsys.readouterr().err


def test_readme_gives_the_committed_result():
    path, text = RESULTS / "overhead.json", (ROOT / "server/README.md").read_text()
    if not path.exists():
        assert "Not yet measured" in text
        return
    report = json.loads(path.read_text())
    summary = report["summary"]
    assert summarize(report["measured"]) == summary
    for title, unit, digits, text_after in (
        ("ttft_added_seconds", 1e3, 2, "ms to the first token"),
        ("cpu_added_seconds_per_request", 1e3, 2, "ms of CPU time"),
        ("cpu_added_seconds_per_token", 1e6, 1, "µs a token"),
    ):
        error = summary[f"{title}_standard_error"] * unit
        assert f"{summary[title] * unit:+.{digits}f} ± {error:.{digits}f} {text_after}" in text
    error = summary["throughput_ratio_standard_error"] * 100
    assert f"{(summary['throughput_ratio'] - 1) * 100:+.2f} ± {error:.2f} % of throughput" in text
