"""What `inspect` shows agrees with the factors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pifa_vllm.checkpoint import Checkpoint, Shards
from pifa_vllm.cli import main
from pifa_vllm.factorization import pifa_parameters
from tests.conftest import Twins
from tests.edit import copy_edited

Q = "model.layers.0.self_attn.q_proj"


def test_json(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(twins.pifa), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    checkpoint = Checkpoint.open(twins.pifa)
    modules = {module["name"]: module for module in found["modules"]}
    assert {name for name, module in modules.items() if module["rank"] is not None} == set(checkpoint.modules)
    assert {name for name, module in modules.items() if module["rank"] is None} == {
        f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)
    }
    factors = checkpoint.load(Q)
    assert modules[Q] == {
        "name": Q,
        "out_features": 64,
        "in_features": 64,
        "rank": 32,
        "parameters": pifa_parameters(64, 64, 32),
        "density": pifa_parameters(64, 64, 32) / 64**2,
        "nbytes": 4 * pifa_parameters(64, 64, 32) + 4 * 32,
        "dense_nbytes": 4 * 64**2,
        "dtype": "float32",
        "bias": False,
        "max_coefficient": pytest.approx(factors.max_coefficient),
    }
    totals = found["totals"]
    assert (totals["compressed_modules"], totals["dense_modules"]) == (12, 2)
    assert totals["density"] == pytest.approx(found["config"]["density"])
    assert totals["parameters"] == sum(module["parameters"] for module in modules.values())
    assert totals["nbytes"] == sum(entry.nbytes for entry in checkpoint.shards.entries.values())
    assert totals["dense_nbytes"] == sum(entry.nbytes for entry in Shards(twins.dense).entries.values())
    assert totals["max_coefficient"] == max(module["max_coefficient"] for module in modules.values())


def test_tables(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(twins.pifa)]) == 0
    by_kind = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in by_kind.splitlines() if "_proj " in line}
    assert rows["q_proj"][1:9] == ["2", "64", "x", "64", "32", "32.0", "32", "0.7500"]
    assert rows["k_proj"][1:7] == ["2", "32", "x", "64", "dense", "1.0000"]
    assert "12 compressed and 2 dense modules" in by_kind
    assert main(["inspect", str(twins.pifa), "--modules"]) == 0
    each = capsys.readouterr().out
    assert sum("_proj " in line for line in each.splitlines()) == 14
    assert f"{Q} " in each


def test_layers_are_in_numerical_order_and_provenance_is_shown(
    twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add_layers(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            for layer in range(2, 11):
                tensors[name.replace("layers.1.", f"layers.{layer}.")] = tensors[name].clone()

    def add_ranks(config: dict[str, Any]) -> None:
        section = config["quantization_config"]
        for name, rank in list(section["ranks"].items()):
            section["ranks"] |= {
                name.replace("layers.1.", f"layers.{layer}."): rank for layer in range(2, 11)
            }
        section["provenance"] = {
            "method": "mpifa [bold]",
            "calibration": {"samples": 16},
            "\x1b[2J": "clears\x1b[2J the screen",
        }
        config["num_hidden_layers"] = 11

    directory = copy_edited(twins.pifa, tmp_path / "ten", tensors=add_layers, config=add_ranks)
    assert main(["inspect", str(directory), "--modules"]) == 0
    out = capsys.readouterr().out
    assert out.index("layers.9.") < out.index("layers.10.")
    assert "method        mpifa [bold]" in out
    assert 'calibration   {"samples": 16}' in out
    assert r"clears\x1b[2J the screen" in out
    assert "\x1b" not in out


def test_refusals(twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(twins.dense)]) == 1
    assert "config.json: not a PIFA checkpoint" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere/config.json: no such file" in capsys.readouterr().err
    spoiled = copy_edited(
        twins.pifa, tmp_path / "nan", tensors=lambda t: t[f"{Q}.coefficients"].view(-1)[:1].fill_(math.nan)
    )
    assert main(["inspect", str(spoiled)]) == 1
    assert f"tensor {Q}.coefficients: expected finite values" in capsys.readouterr().err
