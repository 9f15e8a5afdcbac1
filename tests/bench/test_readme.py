"""The figures of the front page and of the pages that it leads to are what their committed results give."""

import importlib
import json
import math
import re
from pathlib import Path
from statistics import fmean

import pytest

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.gpu.cost_model import layer_table
from pifa_vllm.bench.layer.report import block_table, quantized_table, ratio_table
from pifa_vllm.bench.quality.losses import measured, tables
from pifa_vllm.bench.quality.plan import read_plan
from pifa_vllm.bench.quality.report import cost_table, perplexity_table
from pifa_vllm.bench.served.report import memory_table, ratios
from pifa_vllm.compression.report.figures import duration
from pifa_vllm.evaluate.protocol import standard_error

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pifa_vllm"


def read(name):
    return json.loads((RESULTS / name).read_text())


def test_the_front_page_is_short_and_its_links_lead_somewhere():
    for page in (page for page in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(page.parts)):
        for link in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_front_pages_perplexities_are_the_committed_ones():
    """Density, FLOPs, perplexity, nats lost; and nats lost when healed, and without the gradients."""
    readme = (ROOT / "README.md").read_text()
    found = {(x.variant, x.density): x for x in measured(read("quality-raw.json"), "development")}

    def lost(one):
        return f"{fmean(one.lost):.3f} ± {standard_error(one.lost):.3f}"

    for density in (0.9, 0.8, 0.6, 0.5):
        ours, even = found["mpifa-exact", density], found["even-inputs", density]
        healed = found.get(("healed", density))
        flops = ours.rows[0]["flops_per_token"] / ours.dense["flops_per_token"]
        figures = [
            f"{density:g}",
            f"{flops:.2f}",
            f"{math.exp(fmean(ours.nll())):.1f}",
            lost(ours),
            "" if healed is None else lost(healed),
            lost(even),
        ]
        assert f"| {' | '.join(figures)} |" in readme
    page = (PACKAGE / "healing/README.md").read_text()
    for run in read("healing-smollm2.json")["runs"]:
        density = run["density"]
        before, after = found["mpifa-exact", density], found["healed", density]
        figures = [
            f"{density:g}",
            f"{run['tokens_seen']:,}",
            f"{run['options']['lr']:g}",
            lost(before),
            lost(after),
            f"{before.mean('kl'):.3f}",
            f"{after.mean('kl'):.3f}",
            duration(run["seconds"]),
        ]
        assert f"| {' | '.join(figures)} |" in page
    dense = fmean(found["dense", None].nll())
    assert f"perplexity (dense: {math.exp(dense):.1f})" in readme


BITS = {
    "dense": ("dense", None),
    "dense, int8": ("int8", None),
    "dense, int4 by our rounding": ("int4-dense", 1.0),
    "0.8": ("mpifa-exact", 0.8),
    "0.8, int8": ("int8-factors", 0.8),
    "0.8, int4": ("int4-factors", 0.8),
}


def test_the_front_pages_bits_are_the_committed_ones():
    found = {(x.variant, x.density): x for x in measured(read("quality-raw.json"), "development")}
    rows = []
    for name, key in BITS.items():
        if key not in found:
            continue
        one = found[key]
        dense = one.dense
        cost = next(iter(one.rows.values()), dense)
        flops = cost["flops_per_token"] / dense["flops_per_token"]
        lost = "" if name == "dense" else f"{fmean(one.lost):.3f} ± {standard_error(one.lost):.3f}"
        rows.append(
            f"| {name} | {flops:.2f} | {cost['bytes'] / 1e6:.0f} | {math.exp(fmean(one.nll())):.1f} | {lost} |"
        )
    head = "| model | FLOPs | MB | perplexity | nats lost |\n|---|---|---|---|---|\n"
    assert f"<!-- bits -->\n{head}" + "\n".join(rows) + "\n<!-- /bits -->" in (ROOT / "README.md").read_text()


def test_the_front_pages_speeds_are_the_committed_ones():
    """Where dense bfloat16 is the better dense, both are of the run that it was part of."""
    readme = (ROOT / "README.md").read_text()
    one, eight, prompt, one_more, eight_more = read("e2e-cpu-1b.json")["cells"]
    better = ratios(one_more, "pifa-bfloat16")[0] / ratios(one_more, "dense-bfloat16")[0]
    assert better < ratios(one_more, "pifa-bfloat16")[0]
    assert ratios(eight_more, "dense-bfloat16")[0] < 1.0
    for name, cell, other in (
        ("one request, tokens/s", one, f"{better:.2f}x (dense bfloat16)"),
        ("eight requests, tokens/s", eight, f"{ratios(eight_more, 'pifa-bfloat16')[0]:.2f}x (dense float32)"),
        ("a prompt of 1,024 tokens", prompt, f"{ratios(prompt, 'pifa-bfloat16')[0]:.2f}x (dense float32)"),
    ):
        assert f"| {name} | {ratios(cell, 'pifa-float32')[0]:.2f}x | {other} |" in readme
    cells = [line.split(" | ") for line in memory_table(read("e2e-cpu-1b.json")).splitlines()[2:]]
    tokens = {row[0].removeprefix("| "): int(row[4]) for row in cells}
    float32, bfloat16 = (tokens[f"pifa-{x}"] / tokens[f"dense-{x}"] for x in ("float32", "bfloat16"))
    line = f"| KV-cache tokens in the same memory | {float32:.1f}x | {bfloat16:.1f}x (dense bfloat16) |"
    assert line in readme
    block = read("layer-cpu-llama2-7b.json")
    cells = block_table(block, 0.5, "block").splitlines()[2].split(" | ")
    assert f"gains {float(cells[3][:-1]) / float(cells[8][:-1]):.2f}x at one token" in readme


def test_the_paper_s_own_implementation_is_compared_on_one_text():
    found = read("reference-comparison.json")
    reference, ours = found["reference"], found["pifa_vllm_c54111e"]
    page = (PACKAGE / "compression/README.md").read_text()
    for density in ("0.8", "0.6", "0.5"):
        figures = [found["dense"], reference["svd_llm_w_lowrank"][density], reference["mpifa"][density]]
        figures += [ours["mpifa"].get(density), ours["mpifa-exact"][density]]
        cells = ["" if x is None else f"{x:.1f}" for x in figures]
        assert f"| {density} | {' | '.join(cells)} |" in page
    for method, density, said in (
        ("mpifa", "0.8", "3 % worse"),
        ("mpifa", "0.6", "2 % better"),
        ("mpifa-exact", "0.6", "10 % better"),
        ("mpifa-exact", "0.5", "14 %"),
    ):
        assert (
            f"{abs(ours[method][density] / reference['mpifa'][density] - 1):.0%}".replace("%", " %") in said
        )
        assert said in page


@pytest.mark.parametrize("table", [perplexity_table, cost_table])
def test_tables_are_those_of_the_committed_results(table):
    assert table(read("quality-smollm2.json")) in (PACKAGE / "compression/README.md").read_text()


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


def test_hellaswag_is_that_of_the_committed_items():
    page = (PACKAGE / "bench/README.md").read_text()
    models = read("hellaswag-smollm2.json")["models"]
    dense = models["dense"]["acc_norm"]
    assert len(dense) == 1000
    assert f"| dense | {fmean(dense):.3f} |  |  |" in page
    for name, figures in models.items():
        if name == "dense":
            continue
        found = figures["acc_norm"]
        change = [a - b for a, b in zip(found, dense, strict=True)]
        shown = f"{fmean(change):+.3f} ± {standard_error(change):.3f} | {fmean(found) / fmean(dense):.3f}"
        assert f"| {name} | {fmean(found):.3f} | {shown} |" in page


def test_layer_tables_are_those_of_the_committed_results():
    readme = (PACKAGE / "ops/README.md").read_text()
    squares = json.loads((RESULTS / "layer-cpu-squares.json").read_text())
    assert ratio_table(squares, 0.5) in readme
    block = json.loads((RESULTS / "layer-cpu-llama2-7b.json").read_text())
    assert block_table(block, 0.5, "LLaMA-2-7B block") in readme
    assert quantized_table(read("layer-cpu-quantized.json"), 0.5) in readme


def test_what_a_call_costs_the_processor_is_the_committed_range():
    rows = read("host-calls.json")["rows"]
    (call, check) = ([row[name]["median"] for row in rows] for name in ("call_us", "check_us"))
    text = (
        f"{min(call):.0f} to {max(call):.0f} µs of Python besides Triton's own launch, and {min(check):.0f} to "
        f"{max(check):.0f} of checks"
    )
    assert text in (PACKAGE / "ops/README.md").read_text()


def test_the_table_of_gpus_is_the_committed_prediction_and_says_so():
    predictions = json.loads((RESULTS / "predicted-layers.json").read_text())
    table = layer_table(predictions, 0.5)
    assert "prediction" in table
    assert table in (PACKAGE / "ops/README.md").read_text()


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
