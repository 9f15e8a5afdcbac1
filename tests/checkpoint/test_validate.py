"""Attacks on the format: a wrong claim is an error that names file, tensor, expected and found."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_vllm.checkpoint import Checkpoint, check_finite, check_pivots
from pifa_vllm.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from pifa_vllm.errors import CheckpointError
from pifa_vllm.factorization import pifa_parameters
from tests.checkpoint.sample import LAYER, SHARDS, Sample

Q, UP, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"


def test_a_good_checkpoint_opens_and_verifies(tmp_path: Path) -> None:
    sample = Sample()
    checkpoint = Checkpoint.open(sample.write(tmp_path / "model"))
    checkpoint.verify()
    assert list(checkpoint.modules) == [Q, UP, DOWN]
    up = checkpoint.modules[UP]
    assert (up.m, up.n, up.rank, up.dtype, up.has_bias) == (9, 5, 2, torch.float32, True)
    assert up.parameters == pifa_parameters(9, 5, 2)
    assert up.density == pifa_parameters(9, 5, 2) / 45
    assert up.nbytes == 4 * pifa_parameters(9, 5, 2) + 4 * 2
    assert not checkpoint.modules[Q].has_bias
    factors = checkpoint.load(Q)
    assert torch.equal(factors.pivot_weight, sample.get(f"{Q}.pivot_weight"))
    assert factors.shape == (6, 5)


def test_rank_zero_is_a_matrix_of_zeros(tmp_path: Path) -> None:
    sample = Sample()
    sample.section["ranks"][Q] = 0
    sample.set(f"{Q}.pivot_weight", torch.empty(0, 5))
    sample.set(f"{Q}.coefficients", torch.empty(6, 0))
    sample.set(f"{Q}.pivot_rows", torch.empty(0, dtype=torch.int32))
    checkpoint = Checkpoint.open(sample.write(tmp_path / "model"))
    checkpoint.verify()
    assert torch.equal(checkpoint.load(Q).dense(), torch.zeros(6, 5))


def change_rank(module: str, rank: int) -> Callable[[Sample], None]:
    return lambda sample: sample.section["ranks"].update({module: rank})


def drop_rank(sample: Sample) -> None:
    del sample.section["ranks"][UP]


def drop_tensor(name: str) -> Callable[[Sample], None]:
    return lambda sample: sample.drop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[Sample], None]:
    return lambda sample: sample.set(name, tensor)


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rank_beyond_matrix(sample: Sample) -> None:
    sample.section["ranks"][Q] = 6
    sample.set(f"{Q}.pivot_weight", torch.ones(6, 5))
    sample.set(f"{Q}.coefficients", torch.ones(1, 6))
    sample.set(f"{Q}.pivot_rows", rows(*range(6)))


def integer_factors(sample: Sample) -> None:
    for name in (f"{Q}.pivot_weight", f"{Q}.coefficients"):
        sample.set(name, sample.get(name).to(torch.int32))


HEADER_ATTACKS: dict[str, tuple[Callable[[Sample], None], str]] = {
    "rank too large": (change_rank(Q, 4), rf"{Q}\.pivot_weight: expected \[4, in\].*found \[3, 5\]"),
    "rank too small": (change_rank(Q, 2), rf"{Q}\.pivot_weight: expected \[2, in\].*found \[3, 5\]"),
    "rank beyond the matrix": (
        rank_beyond_matrix,
        rf"{Q}\.pivot_weight: expected a rank of at most min.*found rank 6 of \[7, 5\]",
    ),
    "an empty matrix": (put(f"{Q}.pivot_weight", torch.ones(3, 0)), r"not empty, found rank 3 of \[6, 0\]"),
    "module without tensors": (
        change_rank("layers.9.q_proj", 3),
        r"tensor layers\.9\.q_proj\.pivot_weight is missing",
    ),
    "tensors without a module": (
        drop_rank,
        rf"tensor {UP}\.\w+ belongs to a compressed module that .*ranks does not",
    ),
    "dense weight beside factors": (
        put(f"{Q}.weight", torch.ones(6, 5)),
        rf"tensor {Q}\.weight is dense, but .*compressed to rank 3",
    ),
    "no pivot weight": (drop_tensor(f"{Q}.pivot_weight"), rf"tensor {Q}\.pivot_weight is missing"),
    "no coefficients": (drop_tensor(f"{Q}.coefficients"), rf"tensor {Q}\.coefficients is missing"),
    "no pivot rows": (drop_tensor(f"{Q}.pivot_rows"), rf"tensor {Q}\.pivot_rows is missing"),
    "orphan coefficients": (
        put("lm_head.coefficients", torch.ones(2, 2)),
        r"tensor lm_head\.coefficients belongs",
    ),
    "orphan pivot rows": (put("lm_head.pivot_rows", rows(1)), r"tensor lm_head\.pivot_rows belongs"),
    "coefficients of another rank": (
        put(f"{Q}.coefficients", torch.ones(3, 2)),
        rf"{Q}\.coefficients: expected \[out - 3, 3\], found \[3, 2\]",
    ),
    "coefficients with one axis": (put(f"{Q}.coefficients", torch.ones(9)), r"found \[9\]"),
    "pivot weight with three axes": (put(f"{Q}.pivot_weight", torch.ones(3, 5, 1)), r"found \[3, 5, 1\]"),
    "integer factors": (
        integer_factors,
        rf"{Q}\.coefficients: expected the floating dtype of pivot_weight, torch\.int32",
    ),
    "factors of 8-bit floats": (
        lambda s: [
            s.set(f"{Q}.{x}", s.get(f"{Q}.{x}").to(torch.float8_e4m3fn))
            for x in ("pivot_weight", "coefficients")
        ],
        rf"{Q}\.coefficients: expected the floating dtype of pivot_weight, torch\.float8_e4m3fn",
    ),
    "a norm of 8-bit floats": (
        put("model.norm.weight", torch.ones(5).to(torch.float8_e4m3fn)),
        r"norm\.weight: expected a floating dtype, found torch\.float8_e4m3fn",
    ),
    "factors of two dtypes": (
        put(f"{Q}.coefficients", torch.ones(3, 3, dtype=torch.bfloat16)),
        rf"{Q}\.coefficients: expected .* dtype of pivot_weight, torch\.float32, found torch\.bfloat16",
    ),
    "64-bit pivot rows": (
        put(f"{Q}.pivot_rows", torch.tensor([0, 1, 2])),
        rf"{Q}\.pivot_rows: expected int32 \[3\], found torch\.int64 \[3\]",
    ),
    "floating pivot rows": (
        put(f"{Q}.pivot_rows", torch.ones(3)),
        r"expected int32 \[3\], found torch\.float32",
    ),
    "too few pivot rows": (
        put(f"{Q}.pivot_rows", rows(0, 1)),
        r"expected int32 \[3\], found torch\.int32 \[2\]",
    ),
    "pivot rows with two axes": (
        put(f"{Q}.pivot_rows", rows(0, 1, 2).view(1, 3)),
        r"found torch\.int32 \[1, 3\]",
    ),
    "bias of another length": (
        put(f"{UP}.bias", torch.ones(8)),
        rf"{UP}\.bias: expected .*\[9\], found .*\[8\]",
    ),
    "bias of another dtype": (
        put(f"{UP}.bias", torch.ones(9, dtype=torch.int64)),
        rf"{UP}\.bias: expected torch\.float32 \[9\], found torch\.int64",
    ),
    "unknown key": (lambda s: s.section.update(bits=4), r"quantization_config\.bits"),
    "future format": (lambda s: s.section.update(format_version=3), r"format_version 3, expected at most 2"),
    "fractional rank": (lambda s: s.section["ranks"].update({Q: 3.0}), rf"ranks\.{Q}: .*found 3\.0"),
    "boolean rank": (lambda s: s.section["ranks"].update({Q: True}), rf"ranks\.{Q}: .*found True"),
}

VALUE_ATTACKS: dict[str, tuple[Callable[[Sample], None], str]] = {
    "unsorted rows": (
        put(f"{Q}.pivot_rows", rows(0, 4, 2)),
        r"increasing rows, found 4 followed by 2 at index 1",
    ),
    "duplicate rows": (
        put(f"{Q}.pivot_rows", rows(2, 2, 3)),
        r"increasing rows, found 2 followed by 2 at index 0",
    ),
    "row out of range": (put(f"{Q}.pivot_rows", rows(0, 1, 6)), r"expected rows in \[0, 6\), found 6"),
    "huge row": (
        put(f"{Q}.pivot_rows", rows(0, 1, 2**31 - 1)),
        r"expected rows in \[0, 6\), found 2147483647",
    ),
    "negative row": (put(f"{Q}.pivot_rows", rows(-1, 1, 2)), r"expected rows in \[0, 6\), found -1"),
    "NaN coefficient": (
        lambda s: s.set(
            f"{Q}.coefficients", s.get(f"{Q}.coefficients").index_fill(0, torch.tensor(1), math.nan)
        ),
        rf"{Q}\.coefficients: expected finite values, found 3 NaN or infinite",
    ),
    "infinite pivot weight": (
        put(f"{Q}.pivot_weight", torch.full((3, 5), -math.inf)),
        r"found 15 NaN or infinite",
    ),
    "NaN in a dense tensor": (
        put("model.norm.weight", torch.tensor([1, 1, math.nan, 1, 1])),
        r"norm\.weight: expected finite",
    ),
    "NaN in a bias": (put(f"{UP}.bias", torch.full((9,), math.nan)), rf"{UP}\.bias: expected finite"),
}


@pytest.mark.parametrize("attack", HEADER_ATTACKS)
def test_what_headers_show_is_refused_on_opening(tmp_path: Path, attack: str) -> None:
    spoil, message = HEADER_ATTACKS[attack]
    sample = Sample()
    spoil(sample)
    directory = sample.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", VALUE_ATTACKS)
def test_what_only_values_show_is_refused_on_loading(tmp_path: Path, attack: str) -> None:
    spoil, message = VALUE_ATTACKS[attack]
    sample = Sample()
    spoil(sample)
    checkpoint = Checkpoint.open(sample.write(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.verify()
    assert any(shard in str(caught.value) for shard in SHARDS)
    if Q in message or "rows" in attack:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(Q)


def test_a_tensor_hidden_from_the_index_is_refused(tmp_path: Path) -> None:
    directory = Sample().write(tmp_path / "model")
    index = json.loads((directory / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=rf"{SHARDS[0]}: tensor model\.norm\.weight lies here, but {INDEX_NAME}"
    ):
        Checkpoint.open(directory)


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    # transformers prefers the single file, so something other than what was validated would be loaded.
    directory = Sample().write(tmp_path / "model")
    shutil.copy(directory / SHARDS[0], directory / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_NAME}: lies beside {INDEX_NAME}"):
        Checkpoint.open(directory)


def test_a_shard_that_is_cut_off_after_opening_is_refused(tmp_path: Path) -> None:
    directory = Sample().write(tmp_path / "model")
    checkpoint = Checkpoint.open(directory)
    content = (directory / SHARDS[1]).read_bytes()
    (directory / SHARDS[1]).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: tensor \S+ cannot be read"):
        checkpoint.verify()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-2, 9), max_size=6), st.integers(0, 7))
def test_exactly_the_increasing_rows_in_range_pass(values: list[int], m: int) -> None:
    good = values == sorted(set(values)) and all(0 <= value < m for value in values)
    if good:
        check_pivots(rows(*values), len(values), m, "here")
    else:
        with pytest.raises(CheckpointError, match=r"^here: expected"):
            check_pivots(rows(*values), len(values), m, "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_in_any_dtype(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(7, 5, dtype=dtype)
    check_finite(tensor, "here")
    tensor[6, 4] = value
    with pytest.raises(CheckpointError, match=re.escape("here: expected finite values, found 1 NaN")):
        check_finite(tensor, "here")


def test_integers_are_finite() -> None:
    check_finite(torch.arange(3), "here")
