"""The PIFA linear layer in plain torch: what every kernel is compared with, and what runs where none fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def pifa_linear_reference(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor,
    out_rows: Tensor | None,
    ranks: Sequence[int],
    out_features: Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = x Wᵀ + b for matrices in pivoting form (arXiv 2501.19090, section 3).

    The shapes and the meaning of the arguments are those of `pifa_vllm.ops.pifa_linear`.
    """
    y_p = linear(x, pivot_weight)  # [..., Σr]
    shapes = [(m - r, r) for r, m in zip(ranks, out_features, strict=True)]
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
