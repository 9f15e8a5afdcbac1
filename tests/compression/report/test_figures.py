from __future__ import annotations

from typing import Any

import pytest

from pifa_vllm.compression.report.figures import by_kind, describe_calibration, duration, size, summarize
from tests.compression.report.sample_report import SHAPES, module, sample_report


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (94_371_840, "94.4 MB"),
        (999_600_000, "1.00 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.87, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_kinds_keep_their_order_and_are_summed_up() -> None:
    rows = by_kind(sample_report(depth=2))
    assert [row.kind for row in rows] == list(SHAPES)
    assert all((row.modules, row.rank_min, row.rank_mean, row.rank_max) == (2, 24, 24, 24) for row in rows)
    assert all(row.error_max == pytest.approx(0.11) for row in rows)


def test_densities_are_weighted_by_size() -> None:
    modules = [module("k_proj", 0, 32, density=1.0, dense=True), module("gate_proj", 0, 8, density=0.25)]
    row = summarize("all", modules)
    assert row.density == pytest.approx((32 * 64 + 0.25 * 96 * 64) / (32 * 64 + 96 * 64))
    assert row.dense == 1
    assert row.rank_full == 0


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({}, "No calibration data."),
        ({"source": "self"}, "sampled from the dense model itself"),
        ({"source": "jsonl", "name": "a.jsonl"}, "from the JSONL file a.jsonl"),
        (
            {"source": "dataset", "name": "c4", "config": None, "split": "train"},
            "c4, default config, train split",
        ),
        ({"source": "self", "tokens_file": "t.safetensors"}, "(token file t.safetensors)"),
        ({"source": "elsewhere"}, "of unknown origin"),
    ],
)
def test_calibration_in_words(record: dict[str, Any], text: str) -> None:
    full = {**record, "samples": 16, "length": 1024, "seed": 3} if record else {}
    sentence = describe_calibration(sample_report(calibration=full))
    assert text in sentence
    if record:
        assert sentence.startswith("16 sequences of 1024 tokens")
        assert sentence.endswith("seed 3.")
