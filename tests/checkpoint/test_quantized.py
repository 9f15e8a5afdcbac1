"""Version 2 of the format, with quantized factors: what it stands for, and attacks on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pifa_vllm.checkpoint import Checkpoint, Shards
from pifa_vllm.checkpoint.densify import densify
from pifa_vllm.checkpoint.summary import summarize
from pifa_vllm.errors import CheckpointError
from tests.checkpoint.sample import LAYER, Sample, quantized_sample

Q, UP, K = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.k_proj"
KINDS = [(4, 8, "int"), (4, 4, "int"), (8, 8, "int"), (8, 8, "float")]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_verifies_and_stands_for_nearly_the_same_matrices(
    tmp_path: Path, kind: tuple[int, int, str], columns: bool
) -> None:
    plain = Checkpoint.open(Sample().write(tmp_path / "plain"))
    found = Checkpoint.open(quantized_sample(*kind, columns=columns).write(tmp_path / "quantized"))
    found.verify()
    assert found.linear[K] == (2, 5)
    bound = 0.3 if 4 in kind else 0.05
    for name in plain.modules:
        wanted, values = plain.load(name).dense(), found.load(name).dense()
        assert values.dtype == torch.float32
        assert float((values - wanted).norm()) < bound * float(wanted.norm())
    torch.testing.assert_close(found.load_dense(K), torch.ones(2, 5), rtol=1e-3, atol=0)


def test_it_is_smaller_and_summarized(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(quantized_sample().write(tmp_path / "model"))
    modules = {module.name: module for module in summarize(checkpoint)}
    up = modules[UP]
    assert (up.out_features, up.in_features, up.rank, up.dtype) == (9, 5, 2, "int4/int8")
    # Pivot rows of one block of 16 bytes, coefficients of a byte, a scale for each row, and indices.
    assert up.nbytes == 2 * 16 + 7 * 2 + 2 * 9 + 4 * 2
    assert up.dense_nbytes == 4 * 45
    assert (modules[K].out_features, modules[K].in_features, modules[K].rank) == (2, 5, None)
    assert modules[K].nbytes == 2 * 16 + 2 * 2


def test_pivot_columns_take_as_many_numbers(tmp_path: Path) -> None:
    directories = [quantized_sample(columns=x).write(tmp_path / str(x)) for x in (False, True)]
    rows, columns = ({x.name: x for x in summarize(Checkpoint.open(path))} for path in directories)
    assert columns[UP].parameters == rows[UP].parameters
    # 9 rows of one block, 2 x 3 coefficients, a scale for each row, and indices.
    assert columns[UP].nbytes == 9 * 16 + 2 * 3 + 2 * (9 + 2) + 4 * 2
    assert columns[Q] == rows[Q]


@pytest.mark.parametrize("columns", [False, True])
def test_densify_writes_what_it_stands_for(tmp_path: Path, columns: bool) -> None:
    directory = quantized_sample(columns=columns).write(tmp_path / "model")
    densify(directory, tmp_path / "dense")
    checkpoint, dense = Checkpoint.open(directory), Shards(tmp_path / "dense")
    assert not any("scale" in name for name in dense.entries)
    for name in checkpoint.linear:
        compressed = name in checkpoint.modules
        wanted = checkpoint.load(name).dense() if compressed else checkpoint.load_dense(name)
        torch.testing.assert_close(dense.load(f"{name}.weight"), wanted)


def put(name: str, tensor: torch.Tensor) -> Callable[[Sample], None]:
    return lambda sample: sample.set(name, tensor)


def drop(name: str) -> Callable[[Sample], None]:
    return lambda sample: sample.drop(name)


def change(**fields: object) -> Callable[[Sample], None]:
    return lambda sample: sample.section["factors"].update(fields)


HEADER_ATTACKS: dict[str, tuple[Callable[[Sample], None], str]] = {
    "numbers of the first version": (
        put(f"{Q}.pivot_weight", torch.ones(3, 5)),
        rf"{Q}\.pivot_weight: expected torch\.uint8 \[3, 16\] .*found torch\.float32 \[3, 5\]",
    ),
    "other bits": (change(bits=8), rf"{Q}\.pivot_weight: expected torch\.int8 \[3, 5\] .*found torch\.uint8"),
    "other bits of coefficients": (
        change(coefficient_bits=4),
        rf"{Q}\.coefficients: expected torch\.uint8 \[3, 16\]",
    ),
    "too narrow": (
        put(f"{Q}.pivot_weight", torch.ones(3, 8, dtype=torch.uint8)),
        r"expected torch\.uint8 \[3, 16\] .*found torch\.uint8 \[3, 8\]",
    ),
    "too wide": (
        put(f"{Q}.pivot_weight", torch.ones(3, 32, dtype=torch.uint8)),
        r"found torch\.uint8 \[3, 32\]",
    ),
    "too many scales": (
        put(f"{Q}.pivot_scale", torch.ones(3, 2).half()),
        rf"{Q}\.pivot_scale: expected torch\.float16 \[3, 1\] .*found torch\.float16 \[3, 2\]",
    ),
    "wide scales": (
        put(f"{Q}.pivot_scale", torch.ones(3, 1)),
        r"expected torch\.float16 .*found torch\.float32",
    ),
    "no scale": (drop(f"{Q}.coefficient_scale"), rf"tensor {Q}\.coefficient_scale: expected .*found none"),
    "no numbers": (drop(f"{Q}.coefficients"), rf"tensor {Q}\.coefficients: expected .*found none"),
    "no pivot rows": (drop(f"{Q}.pivot_rows"), rf"tensor {Q}\.pivot_rows is missing"),
    "a rank beyond the matrix": (
        lambda s: s.section["ranks"].update({Q: 6}),
        rf"ranks\['{Q}'\]: expected at most 5",
    ),
    "another rank": (
        lambda s: s.section["ranks"].update({Q: 2}),
        rf"{Q}\.pivot_weight: expected .*\[2, 16\]",
    ),
    "a module that is not there": (
        lambda s: s.section["ranks"].update({"model.layers.7.mlp.up_proj": 1}),
        r"ranks names model\.layers\.7\.mlp\.up_proj",
    ),
    "a dense module as before": (
        put(f"{K}.weight", torch.ones(2, 5)),
        rf"{K}\.weight: expected torch\.uint8",
    ),
    "a dense module without scales": (
        drop(f"{K}.weight_scale"),
        rf"{K}\.weight_scale: expected .*found none",
    ),
    "scales of nothing": (
        put("lm_head.pivot_scale", torch.ones(1, 1).half()),
        r"lm_head\.pivot_scale belongs",
    ),
    "scales of a dense one in a compressed one": (
        put(f"{Q}.weight_scale", torch.ones(6, 1).half()),
        rf"{Q}\.weight_scale: expected no scales",
    ),
    "an integer bias": (
        put(f"{UP}.bias", torch.ones(9, dtype=torch.int32)),
        rf"{UP}\.bias: expected a floating",
    ),
}


@pytest.mark.parametrize("attack", HEADER_ATTACKS)
def test_what_headers_show_is_refused_on_opening(tmp_path: Path, attack: str) -> None:
    spoil, message = HEADER_ATTACKS[attack]
    sample = quantized_sample()
    spoil(sample)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(sample.write(tmp_path / "model"))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pivot_scale", "coefficient_scale", "weight_scale"])
def test_scales_in_a_checkpoint_of_the_first_version_are_refused(tmp_path: Path, suffix: str) -> None:
    sample = Sample()
    sample.set(f"{K if suffix == 'weight_scale' else Q}.{suffix}", torch.ones(3, 1).half())
    with pytest.raises(CheckpointError, match=rf"{suffix}: expected no scales"):
        Checkpoint.open(sample.write(tmp_path / "model"))


COLUMN_ATTACKS: dict[str, tuple[Callable[[Sample], None], str]] = {
    "rows instead": (change(pivot_columns=[]), rf"{UP}\.pivot_weight: expected torch\.uint8 \[2, 16\]"),
    "rows besides": (
        put(f"{UP}.pivot_rows", torch.arange(2, dtype=torch.int32)),
        rf"{UP}\.pivot_rows: expected pivot_columns of this module",
    ),
    "columns of a module with rows": (
        put(f"{Q}.pivot_columns", torch.arange(3, dtype=torch.int32)),
        rf"{Q}\.pivot_columns: expected pivot_rows of this module",
    ),
    "no columns": (drop(f"{UP}.pivot_columns"), rf"tensor {UP}\.pivot_columns is missing"),
    "wide indices": (
        put(f"{UP}.pivot_columns", torch.arange(2)),
        rf"{UP}\.pivot_columns: expected int32 \[2\], found torch\.int64",
    ),
    "coefficients of rows": (
        put(f"{UP}.coefficients", torch.ones(7, 2, dtype=torch.int8)),
        rf"{UP}\.coefficients: expected torch\.int8 \[2, 3\] .*found torch\.int8 \[7, 2\]",
    ),
    "one module of two": (
        change(pivot_columns=["up_proj"]),
        "pivot_columns are those of gate_proj and up_proj",
    ),
    "another module": (change(pivot_columns=["down_proj"]), r"factors\.pivot_columns\.0"),
}


@pytest.mark.parametrize("attack", COLUMN_ATTACKS)
def test_what_does_not_go_with_pivot_columns_is_refused(tmp_path: Path, attack: str) -> None:
    spoil, message = COLUMN_ATTACKS[attack]
    sample = quantized_sample(columns=True)
    spoil(sample)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sample.write(tmp_path / "model"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([0, 5], r"expected columns in \[0, 5\), found 5"),
        ([-1, 1], r"expected columns in \[0, 5\), found -1"),
        ([3, 3], "expected strictly increasing columns, found 3 followed by 3"),
    ],
)
def test_pivot_columns_are_columns(tmp_path: Path, columns: list[int], message: str) -> None:
    sample = quantized_sample(columns=True)
    sample.set(f"{UP}.pivot_columns", torch.tensor(columns, dtype=torch.int32))
    checkpoint = Checkpoint.open(sample.write(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=rf"{UP}\.pivot_columns: {message}"):
        checkpoint.check_pivots()


@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", [f"{Q}.pivot_scale", f"{UP}.coefficient_scale", f"{K}.weight_scale"])
def test_scales_are_finite_and_not_zero(tmp_path: Path, name: str, value: float) -> None:
    sample = quantized_sample()
    sample.set(name, sample.get(name).index_fill(0, torch.tensor(1), value))
    checkpoint = Checkpoint.open(sample.write(tmp_path / "model"))
    with pytest.raises(
        CheckpointError, match=rf"tensor {name}: expected finite scales other than 0, found 1"
    ):
        checkpoint.verify()


def test_floats_of_8_bits_may_not_be_nan(tmp_path: Path) -> None:
    sample = quantized_sample(8, 8, "float")
    sample.set(f"{Q}.coefficients", torch.full((3, 3), math.nan).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=rf"{Q}\.coefficients: expected finite values, found 9"):
        Checkpoint.open(sample.write(tmp_path / "model")).verify()
