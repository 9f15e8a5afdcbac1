"""The PIFA linear layer in plain torch: what every kernel is compared with, and what runs where none fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from pifa_vllm.quantization import dequantize, groups, row_width


def pifa_linear_reference(
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

    The shapes and the meaning of the arguments are those of `pifa_vllm.ops.pifa_linear`. Quantized factors are
    brought to float32 and multiplied in it, whatever the dtype of x.
    """
    shapes = [(m - r, r) for r, m in zip(ranks, out_features, strict=True)]
    if pivot_scale is not None and coefficient_scale is not None:
        weight = dequantize(pivot_weight, pivot_scale, x.shape[-1], group_size)
        coefficients = torch.cat(_dequantized(coefficients, coefficient_scale, shapes, group_size))
        wide_bias = None if bias is None else bias.float()
        return pifa_linear_reference(
            x.float(), weight, coefficients, out_rows, ranks, out_features, wide_bias
        ).to(x.dtype)
    y_p = linear(x, pivot_weight)  # [..., Σr]
    matrices = torch.split(coefficients, [rest * r for rest, r in shapes])
    pivots = torch.split(y_p, list(ranks), dim=-1)
    y_np = [
        linear(y, c.view(s)) for y, c, s in zip(pivots, matrices, shapes, strict=True)
    ]  # [..., m_i - r_i]
    stacked = torch.cat([y_p, *y_np], dim=-1)  # [..., Σm]
    y = stacked
    if out_rows is not None:
        y = torch.zeros_like(stacked).index_copy(-1, out_rows.long(), stacked)
    return y if bias is None else y + bias


def _dequantized(
    coefficients: Tensor, scale: Tensor, shapes: Sequence[tuple[int, int]], group_size: int
) -> list[Tensor]:
    """Flat float32 matrices."""
    numbers = torch.split(coefficients, [rows * row_width(r, coefficients.dtype) for rows, r in shapes])
    scales = torch.split(scale, [rows * groups(r, group_size) for rows, r in shapes])
    return [
        dequantize(
            c.view(rows, row_width(r, c.dtype)), s.view(rows, groups(r, group_size)), r, group_size
        ).flatten()
        for c, s, (rows, r) in zip(numbers, scales, shapes, strict=True)
    ]
