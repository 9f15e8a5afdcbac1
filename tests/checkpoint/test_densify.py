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
    assert {name: (entry.file.name, entry.shape) for name, entry in entries.items()} == {
        "layers.0.q_proj.weight": (SHARDS[0], (6, 5)),
        "norm.weight": (SHARDS[0], (5,)),
        "layers.0.up_proj.weight": (SHARDS[1], (9, 5)),
        "layers.0.up_proj.bias": (SHARDS[1], (9,)),
        "layers.0.down_proj.weight": (SHARDS[1], (5, 9)),
    }
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize("tensor", ["layers.0.q_proj.coefficients", "norm.weight"])
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
