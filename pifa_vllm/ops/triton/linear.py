"""The front of the Triton kernels: decode kernels for few tokens, prefill kernels for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pifa_vllm.ops.triton.configs import (
    DECODE_TOKENS,
    describe,
    plan_decode,
    plan_prefill,
    plan_quantized,
)
from pifa_vllm.ops.triton.decode import decode
from pifa_vllm.ops.triton.prefill import prefill
from pifa_vllm.ops.triton.quantized import quantized


def linear_cuda(
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
    """Compute y = x Wᵀ + b for stacked matrices in pivoting form (arXiv 2501.19090, section 3) on a GPU.

    It checks nothing: shapes, dtypes, devices, contiguity and the range of `out_rows` are the caller's duty, since
    a wrong one makes the kernels read or write out of bounds. It neither waits for the device nor tunes, so that it
    can be captured into a CUDA graph once it has been compiled by a call outside of one. Any sizes are right; n and
    ranks that are multiples of 16 are fast, since others cannot be read 128 bits at a time.

    Args:
        x: [tokens, n] contiguous float32, bfloat16 or float16, tokens > 0.
        pivot_weight: [Σr, n] in the dtype of x, the shards' pivot rows stacked.
        coefficients: [Σ (m_i - r_i) r_i] in the dtype of x, the shards' row-major matrices one after another.
        out_rows: int32 [Σm], the output column of each row of the stacked [pivot rows of all shards; remaining rows
            of shard 0; of shard 1; ...], a permutation. None only with quantized factors and without coefficients.
        ranks: r_i per shard, 0 to m_i.
        out_features: m_i per shard.
        bias: [Σm] in output order, or None.
        pivot_scale: of quantized factors, as the two that follow; see `pifa_linear`.
        coefficient_scale: likewise.
        group_size: likewise.

    Returns:
        [tokens, Σm] in the dtype of x; sums are float32, y_p is rounded to the dtype of x between the products
        (except for one token whose n is split, where it stays float32).
    """
    tokens, n = x.shape
    bits = 8 * x.element_size()
    device = describe(x.get_device())
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.get_device()):
        if pivot_scale is not None and coefficient_scale is not None:
            scales = pivot_scale, coefficient_scale, group_size
            rounded = plan_quantized(device, bits, tokens, n, ranks)
            return quantized(
                x, pivot_weight, coefficients, out_rows, ranks, out_features, bias, *scales, rounded
            )
        if out_rows is None:
            raise ValueError("pifa::linear: out_rows: expected on GPUs beside plain factors, found None.")
        if tokens <= DECODE_TOKENS:
            plan = plan_decode(device, bits, tokens, n, ranks, out_features)
            return decode(x, pivot_weight, coefficients, out_rows, ranks, out_features, bias, plan)
        tiles = plan_prefill(device, bits, tokens, n, ranks, out_features)
        return prefill(x, pivot_weight, coefficients, out_rows, ranks, out_features, bias, tiles)
