"""Dense checkpoints written from PIFA ones, whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pifa_vllm.checkpoint import Shards, densify, writer
from pifa_vllm.errors import CheckpointError
from tests.checkpoint.sample import SHARDS, Sample


def test_shards_biases_and_dense_tensors_keep_their_places(tmp_path: Path) -> None:
    sample = Sample()
    steps: list[tuple[int, int]] = []
    densify(sample.write(tmp_path / "pifa"), tmp_path / "dense", lambda *step: steps.append(step))
    entries = Shards(tmp_path / "dense").entries
    dense = {name for tensors in sample.shards for name in tensors if name.endswith(".weight")}
    assert dense <= entries.keys()
    kept = {"model.norm.weight"}
    changed = {n: (e.file.name, e.shape) for n, e in entries.items() if n in kept or n not in dense}
    assert changed == {
        "model.layers.0.self_attn.q_proj.weight": (SHARDS[0], (6, 5)),
        "model.norm.weight": (SHARDS[0], (5,)),
        "model.layers.0.mlp.up_proj.weight": (SHARDS[1], (9, 5)),
        "model.layers.0.mlp.up_proj.bias": (SHARDS[1], (9,)),
        "model.layers.0.mlp.down_proj.weight": (SHARDS[1], (5, 9)),
    }
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize("tensor", ["model.layers.0.self_attn.q_proj.coefficients", "model.norm.weight"])
def test_damage_leaves_nothing_behind(tmp_path: Path, tensor: str) -> None:
    sample = Sample()
    sample.get(tensor).view(-1)[0] = math.nan
    with pytest.raises(CheckpointError, match=f"tensor {tensor}: expected finite"):
        densify(sample.write(tmp_path / "pifa"), tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["pifa"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Sample().write(tmp_path / "pifa")

    def fail(*_: object, **__: object) -> None:
        raise OSError("broken disk")

    monkeypatch.setattr(writer, "save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written \\(broken disk\\)"):
        densify(source, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["pifa"]
