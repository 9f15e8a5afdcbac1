"""The sum of the parts of y_p = x W_pᵀ where n was split to fill the device.

In plain PyTorch:

    y_p = partials.sum(dim=0).to(y.dtype)                                      # [tokens, Σr]
    y[:, out_rows[:Σr]] = partials.sum(dim=0) + bias[out_rows[:Σr]]
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pifa_vllm.ops.triton.shards import cdiv

_TOKENS, _PIVOTS = 8, 64


def sum_partials(
    partials: Tensor, out_rows: Tensor, bias: Tensor | None, y: Tensor, *, overlap: bool = False
) -> Tensor:
    """Sum the parts, in the order of the splits, and write the sums to the columns of the pivot rows.

    Args:
        partials: float32 [splits, tokens, Σr].
        out_rows: int32 [Σm], of which the first Σr are the columns of the pivot rows.
        bias: [Σm] in output order, or None.
        y: [tokens, Σm], of which those columns are written.
        overlap: the launch may start before the one ahead of it ends.

    Returns:
        y_p, [tokens, Σr] in the dtype of y.
    """
    splits, tokens, pivots = partials.shape
    y_p = y.new_empty(tokens, pivots)
    sum_kernel[cdiv(pivots, _PIVOTS), cdiv(tokens, _TOKENS)](
        partials, out_rows, bias, y_p, y, tokens, pivots, y.shape[1], **sum_options(splits, overlap=overlap)
    )
    return y_p


@cache
def sum_options(splits: int, *, overlap: bool) -> dict[str, Any]:
    """What `sum_kernel` is compiled for."""
    return {
        "SPLITS": splits,
        "BLOCK_T": _TOKENS,
        "BLOCK_P": _PIVOTS,
        "OVERLAP": overlap,
        "num_warps": 4,
        "enable_fp_fusion": True,
        # Only NVIDIA's backend knows this option.
        **({"launch_pdl": True} if overlap else {}),
    }


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(
    partials: tl.tensor,  # [SPLITS, tokens, pivots]
    out_rows: tl.tensor,  # int32 [columns]
    bias: tl.tensor,  # [columns] or None
    y_p: tl.tensor,  # [tokens, pivots]
    y: tl.tensor,  # [tokens, columns]
    tokens: tl.tensor,
    pivots: tl.tensor,
    columns: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Sum a tile of the parts."""
    pivot = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask = (token < tokens)[:, None] & (pivot < pivots)[None, :]
    at = token[:, None] * pivots + pivot[None, :]  # [BLOCK_T, BLOCK_P]
    column = tl.load(out_rows + pivot, mask=pivot < pivots, other=0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    total = load_sum(partials + at, mask, tokens.to(tl.int64) * pivots, SPLITS)
    tl.store(y_p + at, total, mask=mask)
    if bias is not None:
        total += tl.load(bias + column, mask=pivot < pivots, other=0.0).to(tl.float32)[None, :]
    tl.store(y + token[:, None] * columns + column[None, :], total, mask=mask)


@triton.jit
def load_sum(start: tl.tensor, mask: tl.tensor, stride: tl.tensor, SPLITS: tl.constexpr) -> tl.tensor:
    """Load SPLITS numbers, `stride` apart, per pointer and return their float32 sum."""
    total = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(start + split * stride, mask=mask, other=0.0)
    return total
