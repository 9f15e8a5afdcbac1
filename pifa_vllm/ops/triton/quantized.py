"""The PIFA linear layer with quantized factors (`pifa_vllm.quantization`): weights widened in registers.

Two launches for all shards together, whatever the number of tokens. `pivot_kernel` computes y_p = x W_pᵀ, keeps
it in scratch and writes it to the columns of the pivot rows; `output_kernel` multiplies it by each shard's
coefficients and writes the other columns. A matrix that is dense, or one of the two of a module with pivot
columns, is all pivot rows. Where the pivot rows are too few to fill the device, n is split, and a third launch
sums the parts (`partials.py`).

Two 4-bit numbers of a byte are 16 columns apart, so a tile of bytes is two tiles of weights, each of which
meets its own columns of x: nothing has to be put in order. 8-bit floats are read as bits, which older GPUs can
do as well.

In plain PyTorch:

    y_p = x @ dequantize(pivot_weight, pivot_scale).T                          # [tokens, Σr]
    y_np = [y_p_i @ dequantize(C_i, s_i).T for ...]                            # [tokens, m_i - r_i] each
    y[:, out_rows] = cat([y_p, *y_np], dim=1) + bias[out_rows]                 # [tokens, Σm]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pifa_vllm.ops.triton.configs import QuantizedPlan, Tile
from pifa_vllm.ops.triton.partials import sum_partials
from pifa_vllm.ops.triton.shards import Launch, cdiv, count_tiles, locate
from pifa_vllm.quantization import groups, row_width

# As the kernels call them.
KINDS = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}


def quantized(
    plan: QuantizedPlan,
    n: int,
    ranks: Sequence[int],
    out_features: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    group_size: int,
    *,
    in_order: bool = False,
) -> Launch:
    """Prepare the kernels for one layer whose pivot rows and coefficients are stored in `dtypes`.

    Returns:
        What runs them: x [tokens, n], `pivot_weight`, `coefficients`, `out_rows`, `bias`, `pivot_scale` and
        `coefficient_scale` of `linear_cuda` to [tokens, Σm] in the dtype of x. `out_rows` is None if `in_order`,
        where there are no coefficients.
    """
    pivots, columns = sum(ranks), sum(out_features)
    splits = 1 if in_order else plan.splits
    of_pivots, of_rest = (KINDS[dtype] for dtype in dtypes)
    widths = tuple(row_width(r, dtypes[1]) for r in ranks)
    sizes = tuple(ranks), tuple(out_features), widths, tuple(groups(r, group_size) for r in ranks), columns
    pivot_tiles = cdiv(pivots, plan.pivots.rows)
    tiles = count_tiles(ranks, out_features, plan.outputs.rows)
    steps = cdiv(cdiv(n, plan.pivots.k), splits)
    of_layer = (pivots, n, row_width(n, dtypes[0]), groups(n, group_size), columns, steps)
    first_options = {"SPLIT": splits > 1, **options(plan, plan.pivots, of_pivots, group_size)}
    second_options = options(plan, plan.outputs, of_rest, group_size)

    def run(
        x: Tensor,
        pivot_weight: Tensor,
        coefficients: Tensor,
        out_rows: Tensor | None,
        bias: Tensor | None,
        pivot_scale: Tensor,
        coefficient_scale: Tensor,
    ) -> Tensor:
        tokens = x.shape[0]
        token_tiles = cdiv(tokens, plan.block_tokens)
        y, y_p = x.new_empty(tokens, columns), None
        if tiles or splits > 1:
            y_p = x.new_empty(splits, tokens, pivots, dtype=x.dtype if splits == 1 else torch.float32)
        if pivots:
            numbers = pivot_weight.view(torch.int8) if of_pivots == "fp8" else pivot_weight
            pivot_kernel[pivot_tiles, token_tiles, splits](
                x, numbers, pivot_scale, y_p, out_rows, bias, y, tokens, *of_layer, **first_options
            )
        if pivots and splits > 1 and y_p is not None and out_rows is not None:
            y_p = sum_partials(y_p, out_rows, bias, y)
        if tiles:
            numbers = coefficients.view(torch.int8) if of_rest == "fp8" else coefficients
            output_kernel[tiles, token_tiles](
                y_p, numbers, coefficient_scale, out_rows, bias, y, tokens, pivots, *sizes, **second_options
            )
        return y

    return run


def options(plan: QuantizedPlan, tile: Tile, kind: str, group_size: int) -> dict[str, Any]:
    """What either kernel is compiled for."""
    return {
        "BLOCK_T": plan.block_tokens,
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.k,
        "KIND": kind,
        "GROUP": group_size,
        "STAGES": tile.stages,
        "PRECISION": plan.precision,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }


@triton.jit(do_not_specialize=["tokens", "steps"])
def pivot_kernel(
    x: tl.tensor,  # [tokens, n]
    pivot_weight: tl.tensor,  # [pivots, width]
    pivot_scale: tl.tensor,  # [pivots, groups]
    y_p: tl.tensor,  # [splits, tokens, pivots] or None
    out_rows: tl.tensor,  # int32 [columns] or None: in order
    bias: tl.tensor,  # [columns] or None
    y: tl.tensor,  # [tokens, columns]
    tokens: tl.tensor,
    pivots: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    steps: tl.tensor,  # tiles of BLOCK_K inputs per split
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write a tile of y_p = x W_pᵀ to scratch, if there is any, and to the columns of the pivot rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.program_id(2) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, n)
    sums = _product(
        x, n, pivot_weight, width, pivot_scale, scales, row, pivots, token, tokens, begin, end,
        BLOCK_T, BLOCK_M, BLOCK_K, KIND, GROUP, STAGES, PRECISION,
    )  # fmt: skip
    mask = (row < pivots)[:, None] & (token < tokens)[None, :]
    if y_p is not None:
        at = tl.program_id(2) * tokens + token.to(tl.int64)
        tl.store(y_p + at[None, :] * pivots + row[:, None], sums, mask=mask)
    if not SPLIT:
        _scatter(sums, row, row < pivots, token, mask, out_rows, bias, y, columns)


@triton.jit(do_not_specialize=["tokens"])
def output_kernel(
    y_p: tl.tensor,  # [tokens, pivots]
    coefficients: tl.tensor,  # the shards' [m_i - r_i, widths_i], flat
    coefficient_scale: tl.tensor,  # the shards' [m_i - r_i, scale_widths_i], flat
    out_rows: tl.tensor,  # int32 [columns]
    bias: tl.tensor,  # [columns] or None
    y: tl.tensor,  # [tokens, columns]
    tokens: tl.tensor,
    pivots: tl.tensor,
    ranks: tl.tuple,
    out_features: tl.tuple,
    widths: tl.tuple,
    scale_widths: tl.tuple,
    columns: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write y for a tile of remaining rows of one shard: y_p Cᵀ in their columns."""
    tile = tl.program_id(0)
    first, rows, rank, pivot, stacked, width, offset = locate(tile, ranks, out_features, widths, BLOCK_M)
    _, _, _, _, _, scales, scale_offset = locate(tile, ranks, out_features, scale_widths, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    sums = _product(
        y_p + pivot, pivots, coefficients + offset, width, coefficient_scale + scale_offset, scales,
        row, rows, token, tokens, 0, rank,
        BLOCK_T, BLOCK_M, BLOCK_K, KIND, GROUP, STAGES, PRECISION,
    )  # fmt: skip
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    _scatter(sums, row + stacked, row < rows, token, mask, out_rows, bias, y, columns)


@triton.jit
def _product(
    a: tl.tensor,  # [tokens, depth], rows a_stride apart
    a_stride: tl.tensor,
    numbers: tl.tensor,  # [rows, width]
    width: tl.tensor,
    scale: tl.tensor,  # [rows, scales]
    scales: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return float32 [BLOCK_M, BLOCK_T], the tile of Ŵ aᵀ over the columns from `begin` to before `end`.

    What lies beyond the last token or row is arbitrary. `begin` is a multiple of BLOCK_K.
    """
    HALVES: tl.constexpr = 2 if KIND == "int4" else 1
    WIDE: tl.constexpr = BLOCK_K // HALVES  # elements of a row in a tile
    element = tl.arange(0, WIDE)
    column = element // 16 * 32 + element % 16 if HALVES == 2 else element
    # The last row and token stand in for those beyond them, which leaves only the columns to mask.
    whole_row = tl.minimum(row, rows - 1).to(tl.int64)
    w_rows = numbers + whole_row[:, None] * width  # [BLOCK_M, 1]
    s_rows = scale + whole_row * scales  # [BLOCK_M]
    a_rows = a + tl.minimum(token, tokens - 1).to(tl.int64) * a_stride  # [BLOCK_T]
    sums = tl.zeros([BLOCK_M, WIDE if BLOCK_T == 1 else BLOCK_T], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        at = start // HALVES + element
        stored = tl.load(w_rows + at[None, :], mask=(at < width)[None, :], other=0)  # [BLOCK_M, WIDE]
        for half in tl.static_range(HALVES):
            w = _scaled(_widened(stored, half, KIND), s_rows, scales, start, BLOCK_M, BLOCK_K, WIDE, GROUP)
            k = start + column + 16 * half
            if BLOCK_T == 1:
                a_k = tl.load(a + k, mask=k < end, other=0.0)  # [WIDE], of the only token
                sums += w * a_k.to(tl.float32)[None, :]
            else:
                a_at = a_rows[None, :] + k[:, None]
                a_k = tl.load(a_at, mask=(k < end)[:, None], other=0.0)  # [WIDE, BLOCK_T]
                sums = tl.dot(w.to(a_k.dtype), a_k, sums, input_precision=PRECISION)
    total = tl.sum(sums, axis=1)[:, None] if BLOCK_T == 1 else sums
    if GROUP == 0:
        # A row of rank 0 has no scale, and nothing to scale.
        total *= tl.load(s_rows, mask=row * 0 < scales, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def _widened(stored: tl.tensor, half: tl.constexpr, KIND: tl.constexpr) -> tl.tensor:
    """Numbers as float32; of packed ones those of the lower or the higher halves of the bytes."""
    if KIND == "int4":
        return (((stored >> 4 * half) & 15).to(tl.int32) - 8).to(tl.float32)
    if KIND == "fp8":
        # e4m3 in the places of float16's exponent and mantissa is 2^-8 of itself, and so are its subnormals.
        bits = stored.to(tl.int16)
        return ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return stored.to(tl.float32)


@triton.jit
def _scaled(
    w: tl.tensor,  # [BLOCK_M, WIDE]
    s_rows: tl.tensor,  # [BLOCK_M], pointers
    scales: tl.tensor,
    start: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Multiply a tile by the scales of its groups; one scale a row is left for the end."""
    # One way out, since what comes after a `return` is compiled, too.
    if GROUP >= BLOCK_K:
        w *= tl.load(s_rows + start // GROUP).to(tl.float32)[:, None]
    elif GROUP > 0:
        RUNS: tl.constexpr = BLOCK_K // GROUP
        group = start // GROUP + tl.arange(0, RUNS)
        s = tl.load(s_rows[:, None] + group[None, :], mask=(group < scales)[None, :], other=0.0)
        runs = tl.reshape(w, [BLOCK_M, RUNS, WIDE // RUNS]) * s.to(tl.float32)[:, :, None]
        w = tl.reshape(runs, [BLOCK_M, WIDE])
    return w


@triton.jit
def _scatter(
    sums: tl.tensor,  # [BLOCK_M, BLOCK_T]
    stacked: tl.tensor,  # the rows' places in the stacked order
    row_mask: tl.tensor,
    token: tl.tensor,
    mask: tl.tensor,
    out_rows: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
) -> None:
    column = stacked
    if out_rows is not None:
        column = tl.load(out_rows + stacked, mask=row_mask, other=0)
    if bias is not None:
        sums += tl.load(bias + column, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    tl.store(y + token.to(tl.int64)[None, :] * columns + column[:, None], sums, mask=mask)
