"""The front door of the PIFA linear layer: one call for every device and number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from pifa_vllm.factorization import output_order
from pifa_vllm.ops.assemble import assemble


def pifa_linear(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor | Sequence[Tensor],
    out_order: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = x Wᵀ + b for matrices in pivoting form (arXiv 2501.19090, section 3).

    W may be several such matrices stacked; x is then multiplied by all of their pivot rows at once. Nothing is
    checked here, since this runs for every layer and token: check a checkpoint when it is loaded.

    Args:
        x: [..., n], float32, bfloat16 or float16.
        pivot_weight: [Σr, n], the pivot rows of all matrices, stacked, in the dtype of x.
        coefficients: [m_i - r_i, r_i] per matrix, where r_i may be 0 or m_i; one tensor stands for a
            sequence of one.
        out_order: int64 [Σm], the place of each output row in the stacked
            [all pivot rows; remaining rows of matrix 0; of matrix 1; ...] (see `stacked_order`).
        bias: [Σm] in output order, or None.

    Returns:
        [..., Σm] in the dtype of x.
    """
    if isinstance(coefficients, Tensor):
        coefficients = (coefficients,)
    y_p = linear(x, pivot_weight)  # [..., Σr]
    pivots = torch.split(y_p, [c.shape[1] for c in coefficients], dim=-1)
    # A matrix that is all pivot rows has none remaining.
    y_np = [linear(y, c) for y, c in zip(pivots, coefficients, strict=True) if c.shape[0] > 0]
    return assemble(y_p, y_np, out_order, bias)


def stacked_order(pivot_rows: Sequence[Tensor], out_features: Sequence[int]) -> Tensor:
    """Map each output row of several stacked matrices to its place in [all pivot rows; remaining rows, ...].

    Args:
        pivot_rows: integer [r_i] per matrix, strictly increasing rows of that matrix.
        out_features: m_i per matrix.

    Returns:
        int64 [Σm]. For one matrix it is `factorization.output_order`.
    """
    pivots_before, rest_before = 0, sum(rows.numel() for rows in pivot_rows)
    orders = []
    for rows, m in zip(pivot_rows, out_features, strict=True):
        order, rank = output_order(rows, m), rows.numel()
        orders.append(torch.where(order < rank, order + pivots_before, order - rank + rest_before))
        pivots_before += rank
        rest_before += m - rank
    return torch.cat(orders)
