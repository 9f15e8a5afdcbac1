"""The front door of the PIFA linear layer: one op for every device and number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pifa_vllm.factorization import remaining_rows
from pifa_vllm.ops.reference import pifa_linear_reference
from pifa_vllm.quantization import DTYPES, GROUP_SIZES, groups, row_width


def pifa_linear(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor,
    out_rows: Tensor | None,
    ranks: Sequence[int],
    out_features: Sequence[int],
    bias: Tensor | None = None,
    pivot_scale: Tensor | None = None,
    coefficient_scale: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """Compute y = x Wᵀ + b for matrices in pivoting form (arXiv 2501.19090, section 3).

    W may be several such matrices stacked; x is then multiplied by all of their pivot rows at once. Their factors
    may be quantized (`pifa_vllm.quantization`): each kind of factor with integers of 8 or of 4 bits, or both with
    floats of 8, and all with one size of groups. Shapes, dtypes and devices are checked on every call; that the
    rows of `out_rows` are a permutation is for whoever loads them to check (`checkpoint.check_pivots`).

    Args:
        x: [..., n], float32, bfloat16 or float16; any strides.
        pivot_weight: [Σr, n], the pivot rows of all matrices, stacked, in the dtype of x; or quantized,
            [Σr, row_width(n)].
        coefficients: [Σ (m_i - r_i) r_i], the matrices [m_i - r_i, r_i] one after another; r_i may be 0 or m_i. Or
            quantized, like the pivot rows.
        out_rows: int32 [Σm], the output column of each stacked row, where the stack is
            [all pivot rows; remaining rows of matrix 0; of matrix 1; ...] (see `stacked_rows`). None leaves the
            outputs in that order, as a dense matrix (r = m) needs it.
        ranks: r_i.
        out_features: m_i.
        bias: [Σm] in the dtype of x and in output order, or None.
        pivot_scale: float16 [Σr, groups(n)], if the factors are quantized.
        coefficient_scale: float16, the matrices [m_i - r_i, groups(r_i)] one after another, likewise.
        group_size: numbers of a row that share a scale, 32, 64, 128 or 256; 0 for all of them.

    Returns:
        [..., Σm] in the dtype of x, contiguous.

    Raises:
        ValueError: if an argument has a shape, dtype, device or layout that does not fit the others.
    """
    arguments = (x, pivot_weight, coefficients, out_rows, ranks, out_features, bias)
    scales = (pivot_scale, coefficient_scale, group_size)
    trained = (x, pivot_weight, coefficients, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        # The kernels have no backward pass; training and torch.func take the torch ops.
        return pifa_linear_reference(*arguments, *scales)
    y: Tensor = torch.ops.pifa.linear(*arguments, *scales)
    return y


def stacked_rows(pivot_rows: Sequence[Tensor], out_features: Sequence[int]) -> Tensor:
    """List the output column of each row of [all pivot rows; remaining rows of matrix 0; of matrix 1; ...].

    Args:
        pivot_rows: integer [r_i] per matrix, strictly increasing rows of that matrix.
        out_features: m_i per matrix.

    Returns:
        int32 [Σm].
    """
    offsets = [sum(out_features[:i]) for i in range(len(out_features))]
    pivots = [rows.long() + offset for rows, offset in zip(pivot_rows, offsets, strict=True)]
    rest = [remaining_rows(r, m) + o for r, m, o in zip(pivot_rows, out_features, offsets, strict=True)]
    return torch.cat([*pivots, *rest]).to(torch.int32)


def check_arguments(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor,
    out_rows: Tensor | None,
    ranks: Sequence[int],
    out_features: Sequence[int],
    bias: Tensor | None,
    pivot_scale: Tensor | None = None,
    coefficient_scale: Tensor | None = None,
    group_size: int = 0,
) -> None:
    """Check what a kernel takes for granted, before it launches anything.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    scaled = pivot_scale is not None
    if scaled != (coefficient_scale is not None):
        raise ValueError("pifa::linear: expected scales of both factors or of none, found those of one.")
    stored = (pivot_weight.dtype, coefficients.dtype) if scaled else None
    expected = _expected(x.shape[-1], tuple(ranks), tuple(out_features), x.dtype, stored, group_size)
    device = x.device
    found = (pivot_weight, coefficients, out_rows, bias, pivot_scale, coefficient_scale)
    for tensor, (name, shape, dtype) in zip(found, expected, strict=True):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"pifa::linear: {name}: expected {dtype}, found {tensor.dtype}.")
        if tensor.shape != shape:
            raise ValueError(
                f"pifa::linear: {name}: expected shape {list(shape)}, found {list(tensor.shape)}."
            )
        if tensor.device != device:
            raise ValueError(f"pifa::linear: {name}: expected on {x.device} like x, found {tensor.device}.")
        if not tensor.is_contiguous():
            raise ValueError(
                f"pifa::linear: {name}: expected a contiguous tensor, found strides {tensor.stride()}."
            )


@functools.lru_cache(maxsize=4096)
def _expected(
    n: int,
    ranks: tuple[int, ...],
    out_features: tuple[int, ...],
    dtype: torch.dtype,
    stored: tuple[torch.dtype, torch.dtype] | None,
    group_size: int,
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of what follows x in `check_arguments`; as served, one call a layer."""
    if len(ranks) != len(out_features):
        raise ValueError(
            f"pifa::linear: expected as many ranks as out_features, found {len(ranks)} and {len(out_features)}."
        )
    for i, (r, m) in enumerate(zip(ranks, out_features, strict=True)):
        if not 0 <= r <= m:
            raise ValueError(f"pifa::linear: ranks[{i}]: expected 0 to {m}, found {r}.")
    if stored is not None:
        for name, found in zip(("pivot_weight", "coefficients"), stored, strict=True):
            if found not in DTYPES.values():
                raise ValueError(
                    f"pifa::linear: {name}: expected int8, uint8 or float8_e4m3fn with scales, found {found}."
                )
        if len({found == torch.float8_e4m3fn for found in stored}) > 1:
            raise ValueError(
                "pifa::linear: expected float8_e4m3fn of both factors or of none, found "
                f"{stored[0]} and {stored[1]}."
            )
        if group_size not in (0, *GROUP_SIZES):
            raise ValueError(f"pifa::linear: group_size: expected 0, 32, 64, 128 or 256, found {group_size}.")
    of_pivots, of_rest = stored or (dtype, dtype)
    rest = [(m - r, r) for r, m in zip(ranks, out_features, strict=True)]
    numbers = sum(rows * row_width(r, of_rest) for rows, r in rest)
    scales = sum(rows * groups(r, group_size) for rows, r in rest)
    return (
        ("pivot_weight", (sum(ranks), row_width(n, of_pivots)), of_pivots),
        ("coefficients", (numbers,), of_rest),
        ("out_rows", (sum(out_features),), torch.int32),
        ("bias", (sum(out_features),), dtype),
        ("pivot_scale", (sum(ranks), groups(n, group_size)), torch.float16),
        ("coefficient_scale", (scales,), torch.float16),
    )


def _checked_reference(x: Tensor, *arguments: Any) -> Tensor:
    check_arguments(x, *arguments)
    return pifa_linear_reference(x, *arguments)


def _cuda(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor,
    out_rows: Tensor | None,
    ranks: Sequence[int],
    out_features: Sequence[int],
    bias: Tensor | None,
    pivot_scale: Tensor | None = None,
    coefficient_scale: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    factors = (pivot_weight, coefficients, out_rows, list(ranks), list(out_features), bias)
    scales = (pivot_scale, coefficient_scale, group_size)
    check_arguments(x, *factors, *scales)
    if out_rows is None and coefficients.numel():
        raise ValueError("pifa::linear: out_rows: expected on GPUs wherever a rank is below m, found None.")
    if out_rows is None and pivot_scale is None:
        # A dense matrix, or none of whose rows is a pivot row.
        whole = sum(ranks) == sum(out_features)
        return linear(x, pivot_weight, bias) if whole else pifa_linear_reference(x, *factors)
    outputs = sum(out_features)
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # [tokens, n]
    if flat.shape[0] == 0 or outputs == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    # Not at the top: Triton is imported where a GPU is used.
    from pifa_vllm.ops.triton import linear_cuda

    return linear_cuda(flat, *factors, *scales).view(*x.shape[:-1], outputs)


def _fake(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor,
    out_rows: Tensor | None,
    ranks: Sequence[int],
    out_features: Sequence[int],
    *others: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(out_features)))


_library = torch.library.Library("pifa", "DEF")  # type: ignore[no-untyped-call]  # torch has no annotations here
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor pivot_weight, Tensor coefficients, Tensor? out_rows, int[] ranks, "
    "int[] out_features, Tensor? bias, Tensor? pivot_scale=None, Tensor? coefficient_scale=None, "
    "int group_size=0) -> Tensor"
)
# The native CPU kernel (`pifa_vllm.ops.cpu`) takes precedence over this one from the moment it is loaded.
_library.impl("linear", _checked_reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("linear", _cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("pifa::linear", _fake, lib=_library)
