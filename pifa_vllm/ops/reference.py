"""The PIFA linear layer in plain torch: what every other implementation is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def pifa_linear_reference(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Sequence[Tensor],
    out_order: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y = x Wᵀ + b for matrices in pivoting form (arXiv 2501.19090, section 3).

    The shapes and the meaning of the arguments are those of `pifa_vllm.ops.pifa_linear`.
    """
    y_p = linear(x, pivot_weight)  # [..., Σr]
    pivots = torch.split(y_p, [c.shape[1] for c in coefficients], dim=-1)
    y_np = [linear(y, c) for y, c in zip(pivots, coefficients, strict=True)]  # [..., m_i - r_i] each
    y = torch.cat([y_p, *y_np], dim=-1)[..., out_order]  # [..., Σm]
    return y if bias is None else y + bias
