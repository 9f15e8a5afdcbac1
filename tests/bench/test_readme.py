"""Every table of figures in the README is what its committed results give."""

import json
from pathlib import Path

import pytest

import pifa_vllm.bench
from pifa_vllm.bench.table import cost_table, perplexity_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(pifa_vllm.bench.__file__).parent / "results"


@pytest.mark.parametrize("table", [perplexity_table, cost_table])
def test_tables_are_those_of_the_committed_results(table):
    results = json.loads((RESULTS / "quality-smollm2.json").read_text())
    assert table(results) in (ROOT / "README.md").read_text()


def test_results_say_how_they_were_made():
    measured = [*RESULTS.glob("quality-*.json"), *RESULTS.glob("layer-*.json")]
    assert measured
    for path in measured:
        results = json.loads(path.read_text())
        assert results["command"].startswith("pifa-vllm "), path
        assert results["machine"]["cpu"], path
        assert results["machine"]["torch"], path


def test_missing_rows_leave_empty_cells():
    rows = [
        {"variant": "dense", "density": 1.0, "perplexity": 20.0},
        {"variant": "svd", "density": 0.5, "perplexity": 2e7},
        {"variant": "mpifa", "density": 0.8, "perplexity": 30.25},
    ]
    lines = perplexity_table({"rows": rows}).splitlines()
    assert lines[0] == "| density | dense | SVD | `mpifa` |"
    assert lines[2:] == ["| 0.8 | 20.00 |  | 30.2 |", "| 0.5 | 20.00 | 2e+07 |  |"]
