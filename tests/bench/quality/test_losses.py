"""Tables of results made by hand: differences are taken window by window."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from pifa_vllm.bench.quality.losses import loss_table, measured, pair_table, plot, tables

DENSE = [2.0, 4.0, 3.0]


def row(
    variant: str, nll: list[float], density: float | None = None, seed: int | None = None
) -> dict[str, Any]:
    windows = {"nll": nll, "kl": [0.25] * 3, "top1": [0.5] * 3}
    costs = {"flops_per_token": 2_000_000, "bytes": 3_000_000}
    return {"variant": variant, "density": density, "seed": seed, "text": "a", **costs, "windows": windows}


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [
        row("ours", [2.5, 4.6, 3.4], 0.8, 0),
        row("theirs", [2.6, 4.8, 3.6], 0.8, 0),
        row("ours", [2.7, 4.6, 3.6], 0.8, 1),
        row("theirs", [3.0, 5.0, 4.0], 0.5, 0),
        row("int8", [2.0, 4.0, 3.0]),
        row("dense", DENSE),
    ]
    return {"texts": {"a": {"file": "a.txt"}}, "seqlen": 1024, "against": "ours", "rows": rows}


def test_losses_are_of_pairs_of_windows(results: dict[str, Any]) -> None:
    lines = loss_table(results, "a").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| dense",
        "| int8",
        "| ours",
        "| theirs",
        "| theirs",
    ]
    lost = [0.6, 0.6, 0.5]  # the mean over both seeds, window by window
    error = statistics.stdev(lost) / math.sqrt(3)
    assert f"| ours | 0.8 | {math.exp(3 + statistics.mean(lost)):.2f} | 0.5667 ± {error:.4f} |" in lines[4]
    assert lines[4].endswith("| 0.2500 | 50.0 % | 2.0 | 3.0 | 2: 0.5000 to 0.6333 |")
    assert "| int8 |  | 20.09 | 0.0000 ± 0.0000 |" in lines[3]


def test_the_spread_of_windows_that_both_share_is_no_uncertainty(results: dict[str, Any]) -> None:
    (line,) = pair_table(results, "a").splitlines()[2:]
    # Of the seed that both have: 0.1, 0.2, 0.2. Density 0.5 has nothing to be compared with.
    error = statistics.stdev([0.1, 0.2, 0.2]) / math.sqrt(3)
    assert line == f"| theirs | 0.8 | +0.1667 ± {error:.4f} | 0 |"
    assert error < 0.1 * statistics.stdev(DENSE)
    assert pair_table({**results, "against": None}, "a") is None


def test_a_directory_is_compared_with_the_first_seed_that_it_was_made_from(results: dict[str, Any]) -> None:
    results["rows"].append(row("healed", [2.4, 4.4, 3.3], 0.8))
    lines = (pair_table(results, "a") or "").splitlines()
    error = statistics.stdev([0.1, 0.2, 0.1]) / math.sqrt(3)
    assert lines[-1] == f"| healed | 0.8 | -0.1333 ± {error:.4f} | 0 |"


def test_every_text_has_its_tables(results: dict[str, Any]) -> None:
    found = list(tables(results))
    assert found[0] == "a (a.txt), 3 windows of 1024 tokens"
    assert found[1:] == [loss_table(results, "a"), pair_table(results, "a")]
    assert measured(results, "a")[0].lost == [0.0, 0.0, 0.0]


def test_a_plot_is_the_same_of_the_same_results(results: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        plot(results, tmp_path / name)
    one = (tmp_path / "one.svg").read_text()
    assert one == (tmp_path / "two.svg").read_text()
    for label in ("ours", "theirs", "int8", "nats lost"):
        assert f"<!-- {label} -->" in one
