"""Reading tensors by name, and refusing shards that are missing, cut off or not where they should be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pifa_vllm.checkpoint import Shards
from pifa_vllm.checkpoint.shards import INDEX_NAME, SINGLE_NAME, read_header
from pifa_vllm.errors import CheckpointError
from tests.checkpoint.sample import SHARDS, Sample


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Sample().write(tmp_path / "model")


def rewrite_index(directory: Path, **changes: str) -> None:
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def test_every_tensor_is_found_by_name_over_all_shards(directory: Path) -> None:
    sample, shards = Sample(), Shards(directory)
    names = {name for tensors in sample.shards for name in tensors}
    assert set(shards.entries) == names
    for name in names:
        expected = sample.get(name)
        assert name in shards
        assert torch.equal(shards.load(name), expected)
        entry = shards.entry(name)
        assert entry.shape == tuple(expected.shape)
        assert entry.dtype == expected.dtype
        assert entry.nbytes == expected.numel() * expected.element_size()
    assert shards.unindexed == []


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
def test_a_single_file_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    save_file(
        {"a": tensor, "scalar": tensor[1, 1].clone(), "none": tensor[:, :0].clone()}, tmp_path / SINGLE_NAME
    )
    shards = Shards(tmp_path)
    assert torch.equal(shards.load("a"), tensor)
    assert shards.load("a").dtype == dtype
    assert shards.entry("scalar").shape == ()
    assert shards.entry("none").nbytes == 0


def test_rows_are_read_in_the_order_asked_for(directory: Path) -> None:
    shards = Shards(directory)
    weight = shards.load("model.layers.0.mlp.down_proj.pivot_weight")
    rows = torch.tensor([3, 0, 0, 2])
    assert torch.equal(shards.load_rows("model.layers.0.mlp.down_proj.pivot_weight", rows), weight[rows])
    for row in (-1, 4):
        with pytest.raises(CheckpointError, match=rf"has 4 rows, but row {row} is asked for"):
            shards.load_rows("model.layers.0.mlp.down_proj.pivot_weight", torch.tensor([0, row]))


def test_absent_tensors_are_named(directory: Path) -> None:
    shards = Shards(directory)
    for read in (shards.load, shards.entry):
        with pytest.raises(CheckpointError, match=r"model: tensor lm_head\.weight is missing"):
            read("lm_head.weight")


def test_no_directory_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*found no weights"):
        Shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        CheckpointError, match=r"found \['pytorch_model\.bin'\]\. Pickled weights are not read"
    ):
        Shards(tmp_path)


def test_missing_shard(directory: Path) -> None:
    (directory / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: shard is missing, but {INDEX_NAME} names it"):
        Shards(directory)


@pytest.mark.parametrize("part", ["nothing", "length", "header", "data", "last byte"])
def test_truncated_shard(directory: Path, part: str) -> None:
    path = directory / SHARDS[0]
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    keep = {
        "nothing": 0,
        "length": 5,
        "header": 8 + header // 2,
        "data": 8 + header + 1,
        "last byte": len(content) - 1,
    }[part]
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: not a readable safetensors file.*{keep} bytes"):
        Shards(directory)


@pytest.mark.parametrize("header", [b"{}x", b'{"a": 1}', b"[]", b"\xff\xff\xff\xff"])
def test_header_that_is_no_header(directory: Path, header: bytes) -> None:
    (directory / SHARDS[0]).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: not a readable safetensors file"):
        Shards(directory)


def test_bytes_after_the_data_are_refused(directory: Path) -> None:
    with (directory / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Shards(directory)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "sub/inside.safetensors", "{root}/outside.safetensors", "..", ""]
)
def test_an_index_cannot_leave_its_directory(directory: Path, place: str) -> None:
    outside = directory.parent / "outside.safetensors"
    shutil.copy(directory / SHARDS[0], outside)
    (directory / "sub").mkdir()
    shutil.copy(outside, directory / "sub" / "inside.safetensors")
    rewrite_index(directory, **{"model.norm.weight": place.format(root=directory.parent)})
    with pytest.raises(CheckpointError, match="expected names of safetensors files in this directory"):
        Shards(directory)


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 1}])
def test_an_index_without_a_weight_map(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: weight_map: expected an object"):
        Shards(directory)


def test_an_index_that_places_a_tensor_in_the_wrong_shard(directory: Path) -> None:
    rewrite_index(directory, **{"model.norm.weight": SHARDS[1]})
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: tensor model\.norm\.weight is missing"):
        Shards(directory)


def test_tensors_that_the_index_does_not_name_are_reported(directory: Path) -> None:
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    assert Shards(directory).unindexed == [(directory / SHARDS[0], "model.norm.weight")]


def test_dtypes_that_are_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / SINGLE_NAME)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor a: expected one of .*found F8_E5M2"
    ):
        Shards(tmp_path)


def test_a_file_of_somebody_else_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    # Who is root may read everything.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        CheckpointError, match=rf"{path}: this process's user \(id \d+\) is not allowed to read it"
    ):
        list(read_header(path))
