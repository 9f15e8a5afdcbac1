"""The layer benchmark on layers too small to say anything: what it runs, counts, and reports."""

import json

import pytest
import torch

from pifa_vllm.bench.layer.measure import implementations, measure, to_json
from pifa_vllm.bench.layer.report import (
    block_table,
    dispatch_table,
    plot,
    quantized_table,
    ratio_table,
    tables,
)
from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.cli import main
from pifa_vllm.ops.cpu import load

FUSED = LayerShape("qkv_proj", 32, (48, 16, 16))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    assert load()
    monkeypatch.setattr("pifa_vllm.bench.layer.measure._WORKING_SET", 1 << 16)
    monkeypatch.setattr("pifa_vllm.bench.layer.measure._SECONDS", 0.0)


def test_parameters_are_counted_as_stored():
    counts = {i.name: i.parameters for i in implementations(FUSED, 0.5, [torch.float32])}
    assert counts["dense"] == 80 * 32
    assert counts["pifa"] == counts["reference"] <= 0.5 * 80 * 32
    assert counts["lowrank-density"] <= 0.5 * 80 * 32 < counts["lowrank-rank"]


def test_rows_and_tables(tmp_path):
    rows = [row for tokens in (1, 5) for row in measure(FUSED, tokens, 0.5, DTYPES)]
    names = {row.implementation for row in rows}
    assert {"dense", "dense-ours", "pifa", "reference", "lowrank-rank", "lowrank-density"} <= names
    assert {"pifa-int8", "pifa-int4"} <= names
    for row in rows:
        assert row.runs >= 5
        assert 0.0 < row.fastest_ms <= row.ms
        assert row.gflops == pytest.approx(2 * row.parameters * row.tokens / row.ms / 1e6)
    results = json.loads(json.dumps(to_json(rows, {"cpu": "none"}, "pifa-vllm bench layer")))
    table = ratio_table(results, 0.5).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| qkv_proj | 1 | ")
    # Without vLLM its own linear is not among them.
    assert table[2].count("x |") == (7 if "dense-vllm" in names else 5)
    block = block_table(results, 0.5, "block").splitlines()
    assert [line.split(" | ")[2:] for line in block[2:]] == [line.split(" | ")[2:] for line in table[2:]]
    assert "| qkv_proj | 5 | " in dispatch_table(results)
    assert "lowrank" not in dispatch_table(results)
    assert "int" not in dispatch_table(results)
    quantized = quantized_table(results, 0.5).splitlines()
    assert quantized[2].startswith("| qkv_proj | 1 | ")
    assert quantized[2].count("x |") == (7 if "dense-vllm" in names else 6)
    assert tables(results) == [
        ratio_table(results, 0.5),
        quantized_table(results, 0.5),
        dispatch_table(results),
    ]
    plot(results, tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pifa_vllm.bench.layer.measure.ceilings", lambda: {"read_gbytes_per_s": 1.0})
    output = tmp_path / "layer.json"
    options = ["--shapes", "24", "--tokens", "2", "--dtype", "float32", "--output", str(output)]
    assert main(["bench", "layer", *options]) == 0
    assert "| 24 x 24 | 2 |" in capsys.readouterr().out
    assert main(["bench", "table", str(output)]) == 0
    assert "| 24 x 24 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "llama9"], "--shapes: expected sizes or some of llama2-7b"),
        (["--shapes", "0"], "--shapes: expected sizes"),
        (["--tokens", "0"], "--tokens: expected numbers of 1 or more"),
        (["--tokens", "a"], "--tokens: expected numbers of 1 or more"),
        (["--density", "2"], "--density: expected numbers in (0, 1], found 2"),
        (["--dtype", "int8"], "--dtype: expected some of float32, bfloat16, found int8"),
    ],
)
def test_refusals(options, message, tmp_path, capsys):
    assert main(["bench", "layer", *options, "--output", str(tmp_path / "o.json")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(48, 16), (64, 40)])  # with pivot rows and with columns
def test_quantized_layers_read_fewer_bytes(sizes):
    shape = LayerShape("layer", 32, sizes)
    found = {i.name: i for i in implementations(shape, 0.5, [torch.bfloat16])}
    assert found["pifa"].nbytes == 2 * found["pifa"].parameters
    assert found["pifa-int8"].nbytes == pytest.approx(found["pifa"].parameters * (8 + 16 / 128) / 8)
    for name in ("pifa-int8", "pifa-int4"):
        assert found[name].make()(torch.randn(3, 32, dtype=torch.bfloat16)).shape == (3, sum(sizes))
