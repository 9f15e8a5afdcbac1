"""Every table of figures in the README is what its committed results give."""

import importlib
import json
from pathlib import Path

import pytest

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.gpu.cost_model import layer_table
from pifa_vllm.bench.layer.report import block_table, ratio_table
from pifa_vllm.bench.quality.losses import tables
from pifa_vllm.bench.quality.plan import read_plan
from pifa_vllm.bench.quality.report import cost_table, perplexity_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("table", [perplexity_table, cost_table])
def test_tables_are_those_of_the_committed_results(table):
    results = json.loads((RESULTS / "quality-smollm2.json").read_text())
    assert table(results) in (ROOT / "README.md").read_text()


def test_losses_are_those_of_the_committed_results():
    plan = read_plan(RESULTS / "quality-raw.yaml")
    page = (ROOT / "pifa_vllm/bench/README.md").read_text()
    section = page.split("<!-- quality-raw -->")[1].split("<!-- /quality-raw -->")[0].strip()
    path = RESULTS / "quality-raw.json"
    # A page must not have figures that no results stand behind, nor leave out those that there are.
    assert path.exists() == bool(section)
    if path.exists():
        results = json.loads(path.read_text())
        assert section.startswith("\n\n".join(tables(results)))
        assert {row["variant"] for row in results["rows"]} <= {"dense", *plan.variants}


def test_layer_tables_are_those_of_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    squares = json.loads((RESULTS / "layer-cpu-squares.json").read_text())
    assert ratio_table(squares, 0.5) in readme
    block = json.loads((RESULTS / "layer-cpu-llama2-7b.json").read_text())
    assert block_table(block, 0.5, "LLaMA-2-7B block") in readme


def test_the_table_of_gpus_is_the_committed_prediction_and_says_so():
    predictions = json.loads((RESULTS / "predicted-layers.json").read_text())
    table = layer_table(predictions, 0.5)
    assert "prediction" in table
    assert table in (ROOT / "README.md").read_text()


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


def test_the_table_of_vllm_versions_is_the_committed_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".ci")
    matrix = importlib.import_module("matrix")
    results = json.loads((RESULTS / "vllm-versions.json").read_text())
    assert results["command"].startswith("make test-matrix")
    assert matrix.table(results["versions"]) in (ROOT / "pifa_vllm/plugin/README.md").read_text()
