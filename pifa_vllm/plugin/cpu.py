"""PIFA on vLLM's CPU backend: both factors prepacked once, as vLLM prepacks the weights of dense layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import linear
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from pifa_vllm.ops import assemble

Matmul = Callable[[Tensor], Tensor]


class PackedFactors:
    """The factors of one layer in the layout of the fastest matmul that vLLM has for this CPU.

    Args:
        pivot_weight: [Σr, n], copied.
        coefficients: [m_i - r_i, r_i] per shard, copied.
    """

    def __init__(self, pivot_weight: Tensor, coefficients: Sequence[Tensor]) -> None:
        self.ranks = [c.shape[1] for c in coefficients]
        self.pivots = _packed(pivot_weight)
        # A shard that is all pivot rows has none remaining.
        self.rest = [_packed(c) if c.shape[0] else None for c in coefficients]

    def linear(self, x: Tensor, out_order: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply as `ops.pifa_linear` does: x [..., n] to [..., Σm]."""
        y_p = self.pivots(x)  # [..., Σr]
        pivots = torch.split(y_p, self.ranks, dim=-1)
        y_np = [matmul(y) for y, matmul in zip(pivots, self.rest, strict=True) if matmul is not None]
        return assemble(y_p, y_np, out_order, bias)


def _packed(weight: Tensor) -> Matmul:
    if weight.numel() == 0:
        empty = weight.clone()
        return lambda x: linear(x, empty)
    holder = Module()
    # A copy, so that the layer's own parameter can be freed even where vLLM has no packed matmul.
    holder.weight = Parameter(weight.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=True)
    matmul: Callable[..., Tensor] = holder.cpu_linear  # type: ignore[assignment]  # set by the line above
    return lambda x: matmul(x, holder.weight, None)
