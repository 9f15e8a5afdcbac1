"""The PIFA linear layer for few tokens (decoding), which is bound by the bytes of its weights.

Two launches for all shards together, each of which reads its weights once:

1. `pivot_kernel`: y_p = x W_pᵀ into scratch. Where the pivot rows are too few to fill the device, n is split, and
   each split leaves a float32 partial sum.
2. `output_kernel`: multiplies y_p by the coefficients, adds the bias, and writes every output once, in its column;
   some programs only copy y_p to the columns of the pivot rows. For one token it sums partials while loading them.
   For several that would read them too often, and a small launch in between sums them (`partials.py`).

There are no atomics and nothing to zero, and the order of every sum is fixed: equal inputs give equal bits. On
NVIDIA GPUs from compute capability 9.0 a kernel is launched while the one before it still runs (programmatic
dependent launch): it fetches the first of its coefficients into L2 and then waits for that kernel's end.

In plain PyTorch:

    y_p = x @ pivot_weight.T                                                   # [tokens, Σr]
    y_np = [y_p_i @ C_i.T for y_p_i, C_i in zip(split(y_p, ranks), C)]         # [tokens, m_i - r_i] each
    y[:, out_rows] = cat([y_p, *y_np], dim=1) + bias[out_rows]                 # [tokens, Σm]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pifa_vllm.ops.triton.configs import DecodePlan
from pifa_vllm.ops.triton.partials import load_sum, sum_partials
from pifa_vllm.ops.triton.shards import Launch, cdiv, count_tiles, locate


def decode(plan: DecodePlan, n: int, ranks: Sequence[int], out_features: Sequence[int]) -> Launch:
    """Prepare the kernels for one layer and at most `plan.block_tokens` tokens.

    Returns:
        What runs them: x [tokens, n], `pivot_weight`, `coefficients`, `out_rows` and `bias` of `linear_cuda` to
        [tokens, Σm] in the dtype of x.
    """
    pivots, columns, splits = sum(ranks), sum(out_features), plan.splits
    sizes = tuple(ranks), tuple(out_features), columns
    summed = pivots > 0 and splits > 1 and not plan.sums_while_loading
    copies = 0 if summed else cdiv(pivots, plan.copied)
    tiles = count_tiles(ranks, out_features, plan.outputs.rows)
    steps = cdiv(cdiv(n, plan.pivots.k), splits)
    first_options = pivot_options(plan)
    # Without a first launch there is nothing to overlap with.
    second_options = output_options(plan if pivots else replace(plan, overlap=False))
    first, second = (cdiv(pivots, plan.pivots.rows), splits), (tiles + copies,)

    def run(
        x: Tensor, pivot_weight: Tensor, coefficients: Tensor, out_rows: Tensor, bias: Tensor | None
    ) -> Tensor:
        tokens = x.shape[0]
        y = x.new_empty(tokens, columns)
        # A sum that is complete is rounded at once, as it would be before the second product.
        y_p = x.new_empty(splits, tokens, pivots, dtype=x.dtype if splits == 1 else torch.float32)
        if pivots:
            pivot_kernel[first](x, pivot_weight, y_p, tokens, pivots, n, steps, **first_options)
        if summed:
            y_p = sum_partials(y_p, out_rows, bias, y, overlap=plan.overlap)
        if tiles + copies:
            output_kernel[second](
                y_p, coefficients, out_rows, bias, y, tokens, pivots, tiles, *sizes, **second_options
            )
        return y

    return run


def pivot_options(plan: DecodePlan) -> dict[str, Any]:
    """What `pivot_kernel` is compiled for."""
    tile = plan.pivots
    return {
        "BLOCK_T": plan.block_tokens,
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.k,
        "STAGES": tile.stages,
        "PRECISION": plan.precision,
        "OVERLAP": plan.overlap,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }


def output_options(plan: DecodePlan) -> dict[str, Any]:
    """What `output_kernel` is compiled for."""
    tile = plan.outputs
    return {
        "SPLITS": plan.splits if plan.sums_while_loading else 1,
        "BLOCK_T": plan.block_tokens,
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.k,
        "BLOCK_P": plan.copied,
        "STAGES": tile.stages,
        "PRECISION": plan.precision,
        "OVERLAP": plan.overlap,
        "THREADS": 32 * tile.warps,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
        # Only NVIDIA's backend knows this option.
        **({"launch_pdl": True} if plan.overlap else {}),
    }


@triton.jit(do_not_specialize=["tokens", "steps"])
def pivot_kernel(
    x: tl.tensor,  # [tokens, n]
    pivot_weight: tl.tensor,  # [pivots, n]
    y_p: tl.tensor,  # [splits, tokens, pivots]
    tokens: tl.tensor,
    pivots: tl.tensor,
    n: tl.tensor,
    steps: tl.tensor,  # tiles of BLOCK_K inputs per split
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Leave a split's sum over its part of n of x W_pᵀ, float32 or, if it is the only one, in the dtype of x."""
    if OVERLAP:
        # The dependent programs may take the room that this kernel leaves; they wait for its end themselves.
        gdc_launch_dependents()
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_T)
    w_rows = pivot_weight + row.to(tl.int64)[:, None] * n  # [BLOCK_M, 1]
    w_mask = (row < pivots)[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_K if BLOCK_T == 1 else BLOCK_T], tl.float32)
    for step in tl.range(split * steps, (split + 1) * steps, num_stages=STAGES):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(w_rows + k[None, :], mask=w_mask & (k < n)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if BLOCK_T == 1:
            x_k = tl.load(x + k, mask=k < n, other=0.0)  # [BLOCK_K]
            sums += w.to(tl.float32) * x_k.to(tl.float32)[None, :]
        else:
            x_mask = (k < n)[:, None] & (token < tokens)[None, :]
            x_k = tl.load(x + token[None, :] * n + k[:, None], mask=x_mask, other=0.0)  # [BLOCK_K, BLOCK_T]
            sums = tl.dot(w, x_k, sums, input_precision=PRECISION)
    total = tl.sum(sums, axis=1)[:, None] if BLOCK_T == 1 else sums  # [BLOCK_M, BLOCK_T]
    to = y_p + (split * tokens + token)[None, :] * pivots + row[:, None]
    tl.store(to, total, mask=w_mask & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens", "tiles"])
def output_kernel(
    y_p: tl.tensor,  # [SPLITS, tokens, pivots]
    coefficients: tl.tensor,  # the shards' [m_i - r_i, r_i], flat
    out_rows: tl.tensor,  # int32 [columns]
    bias: tl.tensor,  # [columns] or None
    y: tl.tensor,  # [tokens, columns]
    tokens: tl.tensor,
    pivots: tl.tensor,
    tiles: tl.tensor,  # programs that multiply; the others copy pivot outputs
    ranks: tl.tuple,
    out_features: tl.tuple,
    columns: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Write y for a tile of remaining rows of one shard, or copy y_p to the columns of a tile of pivot rows."""
    tile = tl.program_id(0)
    token = tl.arange(0, BLOCK_T)
    if tile < tiles:
        first, rows, rank, pivot, stacked, _, offset = locate(tile, ranks, out_features, ranks, BLOCK_M)
        if OVERLAP:
            if rank > 0:
                start = coefficients + offset
                _fetch_to_l2(start, first.to(tl.int64) * rank, rows.to(tl.int64) * rank, THREADS)
            gdc_wait()
        row = first + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        c_rows = coefficients + offset + row.to(tl.int64)[:, None] * rank
        sums = tl.zeros([BLOCK_M, BLOCK_K if BLOCK_T == 1 else BLOCK_T], tl.float32)
        for start_k in tl.range(0, rank, BLOCK_K, num_stages=STAGES):
            k = start_k + tl.arange(0, BLOCK_K)
            c = tl.load(c_rows + k[None, :], mask=row_mask[:, None] & (k < rank)[None, :], other=0.0)
            if BLOCK_T == 1:
                y_k = load_sum(y_p + pivot + k, k < rank, pivots, SPLITS)  # [BLOCK_K]
                sums += c.to(tl.float32) * y_k[None, :]
            else:
                y_mask = (k < rank)[:, None] & (token < tokens)[None, :]
                from_k = y_p + token[None, :] * pivots + (pivot + k)[:, None]
                y_k = tl.load(from_k, mask=y_mask, other=0.0)  # [BLOCK_K, BLOCK_T]
                sums = tl.dot(c, y_k, sums, input_precision=PRECISION)
        out = tl.sum(sums, axis=1)[:, None] if BLOCK_T == 1 else sums  # [BLOCK_M, BLOCK_T]
        _scatter(out, row + stacked, row_mask, out_rows, bias, y, tokens, columns, BLOCK_T)
    else:
        if OVERLAP:
            gdc_wait()
        # Names of their own: Triton gives a name one shape in both branches.
        pivot_row = (tile - tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        copy_mask = (pivot_row < pivots)[:, None] & (token < tokens)[None, :]
        from_row = y_p + token[None, :] * pivots + pivot_row[:, None]
        copied = load_sum(from_row, copy_mask, tokens * pivots, SPLITS)  # [BLOCK_P, BLOCK_T]
        _scatter(copied, pivot_row, pivot_row < pivots, out_rows, bias, y, tokens, columns, BLOCK_T)


@triton.jit
def _scatter(
    out: tl.tensor,  # [rows, BLOCK_T]
    row: tl.tensor,
    row_mask: tl.tensor,
    out_rows: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    BLOCK_T: tl.constexpr,
) -> None:
    column = tl.load(out_rows + row, mask=row_mask, other=0)
    if bias is not None:
        out += tl.load(bias + column, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    token = tl.arange(0, BLOCK_T)
    to = y + token[None, :] * columns + column[:, None]
    tl.store(to, out, mask=row_mask[:, None] & (token < tokens)[None, :])


@triton.jit
def _fetch_to_l2(start: tl.tensor, first: tl.tensor, end: tl.tensor, THREADS: tl.constexpr) -> None:
    """Ask for one 128-byte line per thread, from element `first` on and before element `end`, without waiting."""
    LINE: tl.constexpr = 1024 // start.dtype.element_ty.primitive_bitwidth
    element = tl.minimum(first + tl.arange(0, THREADS) * LINE, end - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [start + element],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
