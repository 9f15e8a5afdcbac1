"""The PIFA linear layer for many tokens (prefill), which is bound by arithmetic: tiles on tensor cores.

Two launches for all shards together. `pivot_kernel` computes y_p = x W_pᵀ, keeps it in scratch and writes it to
the columns of the pivot rows; `output_kernel` multiplies it by each shard's coefficients and writes the other
columns. Where the tiles of the first are too few to fill the device, n is split, and a third launch in between sums
the parts (`partials.py`). y is written once and y_p never gathered. Ranks need no padding: the last tile of a depth
is masked.

In plain PyTorch:

    y_p = x @ pivot_weight.T                                                   # [tokens, Σr]
    y_np = [y_p_i @ C_i.T for y_p_i, C_i in zip(split(y_p, ranks), C)]         # [tokens, m_i - r_i] each
    y[:, out_rows] = cat([y_p, *y_np], dim=1) + bias[out_rows]                 # [tokens, Σm]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pifa_vllm.ops.triton.configs import PrefillPlan, PrefillTile
from pifa_vllm.ops.triton.partials import sum_partials
from pifa_vllm.ops.triton.shards import Launch, cdiv, count_tiles, locate

# Programs that run beside each other share this many tiles of tokens, so that their weights come from L2.
_GROUP = 8


def prefill(plan: PrefillPlan, n: int, ranks: Sequence[int], out_features: Sequence[int]) -> Launch:
    """Prepare the kernels for one layer.

    Returns:
        What runs them: x [tokens, n], `pivot_weight`, `coefficients`, `out_rows` and `bias` of `linear_cuda` to
        [tokens, Σm] in the dtype of x.
    """
    pivots, columns, splits = sum(ranks), sum(out_features), plan.splits
    sizes = tuple(ranks), tuple(out_features), columns
    first, second = plan.pivots, plan.outputs
    pivot_tiles, tiles = cdiv(pivots, first.rows), count_tiles(ranks, out_features, second.rows)
    steps = cdiv(cdiv(n, first.k), splits)
    first_options = {"SPLIT": splits > 1, **options(first, plan.precision)}
    second_options = options(second, plan.precision)

    def run(
        x: Tensor, pivot_weight: Tensor, coefficients: Tensor, out_rows: Tensor, bias: Tensor | None
    ) -> Tensor:
        tokens = x.shape[0]
        y = x.new_empty(tokens, columns)
        y_p = x.new_empty(splits, tokens, pivots, dtype=x.dtype if splits == 1 else torch.float32)
        if pivots:
            grid = (pivot_tiles * cdiv(tokens, first.tokens), splits)
            of_layer = (tokens, pivots, n, columns, steps)
            pivot_kernel[grid](x, pivot_weight, y_p, out_rows, bias, y, *of_layer, **first_options)
        if pivots and splits > 1:
            y_p = sum_partials(y_p, out_rows, bias, y)
        if tiles:
            output_kernel[(tiles * cdiv(tokens, second.tokens),)](
                y_p, coefficients, out_rows, bias, y, tokens, pivots, tiles, *sizes, **second_options
            )
        return y

    return run


def options(tile: PrefillTile, precision: str) -> dict[str, Any]:
    """What either kernel is compiled for."""
    return {
        "BLOCK_T": tile.tokens,
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.k,
        "GROUP": _GROUP,
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


@triton.jit(do_not_specialize=["tokens", "steps"])
def pivot_kernel(
    x: tl.tensor,  # [tokens, n]
    pivot_weight: tl.tensor,  # [pivots, n]
    y_p: tl.tensor,  # [splits, tokens, pivots]
    out_rows: tl.tensor,  # int32 [columns]
    bias: tl.tensor,  # [columns] or None
    y: tl.tensor,  # [tokens, columns]
    tokens: tl.tensor,
    pivots: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    steps: tl.tensor,  # tiles of BLOCK_K inputs per split
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write a tile of y_p = x W_pᵀ to scratch, and to the columns of the pivot rows if it is the whole sum."""
    tile, token_tile = _order(tl.cdiv(pivots, BLOCK_M), tl.cdiv(tokens, BLOCK_T), GROUP)
    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, n)
    sums = _product(
        x, n, pivot_weight, n, token, tokens, row, pivots, begin, end, BLOCK_T, BLOCK_M, BLOCK_K, PRECISION
    )
    mask = (token < tokens)[:, None] & (row < pivots)[None, :]
    # Of the splits' [splits · tokens, pivots].
    at = tl.program_id(1) * tokens + token.to(tl.int64)
    tl.store(y_p + at[:, None] * pivots + row[None, :], sums, mask=mask)
    if not SPLIT:
        _scatter(sums, token, row, row < pivots, mask, out_rows, bias, y, columns)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def output_kernel(
    y_p: tl.tensor,  # [tokens, pivots]
    coefficients: tl.tensor,  # the shards' [m_i - r_i, r_i], flat
    out_rows: tl.tensor,  # int32 [columns]
    bias: tl.tensor,  # [columns] or None
    y: tl.tensor,  # [tokens, columns]
    tokens: tl.tensor,
    pivots: tl.tensor,
    tiles: tl.tensor,
    ranks: tl.tuple,
    out_features: tl.tuple,
    columns: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write y for a tile of remaining rows of one shard: y_p Cᵀ in their columns."""
    tile, token_tile = _order(tiles, tl.cdiv(tokens, BLOCK_T), GROUP)
    first, rows, rank, pivot, stacked, _, offset = locate(tile, ranks, out_features, ranks, BLOCK_M)
    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row = first + tl.arange(0, BLOCK_M)
    sums = _product(
        y_p + pivot, pivots, coefficients + offset, rank,
        token, tokens, row, rows, 0, rank, BLOCK_T, BLOCK_M, BLOCK_K, PRECISION,
    )  # fmt: skip
    mask = (token < tokens)[:, None] & (row < rows)[None, :]
    _scatter(sums, token, row + stacked, row < rows, mask, out_rows, bias, y, columns)


@triton.jit
def _order(row_tiles: tl.tensor, token_tiles: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Walk the tiles in bands of GROUP token tiles, all of a band's tokens for one tile of rows after another."""
    program = tl.program_id(0)
    band = program // (GROUP * row_tiles)
    height = tl.minimum(token_tiles - band * GROUP, GROUP)
    within = program % (GROUP * row_tiles)
    return within // height, band * GROUP + within % height


@triton.jit
def _product(
    a: tl.tensor,  # [tokens, depth], rows a_stride apart
    a_stride: tl.tensor,
    b: tl.tensor,  # [rows, depth], rows b_stride apart
    b_stride: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return float32 [BLOCK_T, BLOCK_M], the tile of a bᵀ over the columns from `begin` to before `end`.

    What lies beyond the last token or row is arbitrary.
    """
    k = tl.arange(0, BLOCK_K)
    # The last token and row stand in for those beyond them, which leaves only the columns to mask.
    a_at = (
        a + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * a_stride + begin + k[None, :]
    )  # [BLOCK_T, BLOCK_K]
    b_at = (
        b + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * b_stride + begin + k[:, None]
    )  # [BLOCK_K, BLOCK_M]
    sums = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_K):
        left = k < end - start
        a_k = tl.load(a_at, mask=left[None, :], other=0.0)
        b_k = tl.load(b_at, mask=left[:, None], other=0.0)
        sums = tl.dot(a_k, b_k, sums, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K
    return sums


@triton.jit
def _scatter(
    sums: tl.tensor,  # [BLOCK_T, rows]
    token: tl.tensor,
    stacked: tl.tensor,  # the rows' places in the stacked order
    row_mask: tl.tensor,
    mask: tl.tensor,
    out_rows: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
) -> None:
    column = tl.load(out_rows + stacked, mask=row_mask, other=0)
    if bias is not None:
        sums += tl.load(bias + column, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * columns + column[None, :], sums, mask=mask)
