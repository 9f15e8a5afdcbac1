"""The front of the Triton kernels: decode kernels for few tokens, prefill kernels for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pifa_vllm.ops.triton.configs import (
    DecodePlan,
    bucket,
    buckets,
    describe,
    plan_plain,
    plan_quantized,
)
from pifa_vllm.ops.triton.decode import decode
from pifa_vllm.ops.triton.prefill import prefill
from pifa_vllm.ops.triton.quantized import quantized
from pifa_vllm.ops.triton.shards import Launch


class _Layer(NamedTuple):
    """What the kernels are prepared and compiled for, besides the bucket of the token count."""

    device: int
    dtype: torch.dtype
    n: int
    ranks: tuple[int, ...]
    out_features: tuple[int, ...]
    biased: bool
    in_order: bool
    stored: tuple[torch.dtype, torch.dtype] | None
    group_size: int


# By the bucket of the token count. A model has few layers, and a process few models.
_launches: dict[tuple[Any, ...], dict[int, Launch]] = {}


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
    a wrong one makes the kernels read or write out of bounds. It neither waits for the device nor tunes. A layer's
    first call launches whatever calls with as many tokens or fewer will, so that it is compiled: in vLLM that is
    the profiling run, with the most tokens that a step can have, before any graph is captured. Any sizes are right;
    n and ranks that are multiples of 16 are fast, since others cannot be read 128 bits at a time.

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
    stored = None if pivot_scale is None else (pivot_weight.dtype, coefficients.dtype)
    tokens, n = x.shape
    about = (bias is not None, out_rows is None, stored, group_size)
    # As `_Layer`, which takes longer to make.
    layer = (x.get_device(), x.dtype, n, tuple(ranks), tuple(out_features), *about)
    prepared = _launches.setdefault(layer, {})
    launch = prepared.get(bucket(tokens))
    factors = (pivot_weight, coefficients, out_rows, bias)
    arguments = factors if stored is None else (*factors, pivot_scale, coefficient_scale)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(layer[0]):
        if launch is None:
            launch = _prepare(_Layer(*layer), prepared, x, arguments)
        return launch(x, *arguments)


def _prepare(
    layer: _Layer, prepared: dict[int, Launch], x: Tensor, arguments: tuple[Tensor | None, ...]
) -> Launch:
    """Prepare a layer for as many tokens as x has and fewer, and compile all kernels but those that x will."""
    tokens = x.shape[0]
    # What is launched while a graph is captured would become part of it.
    capturing = torch.cuda.is_current_stream_capturing()
    plans: dict[object, Launch] = {}
    for size in buckets(tokens):
        if size in prepared or (capturing and size < tokens):
            continue
        plan, launch = _plan(layer, size)
        if plan not in plans and size < tokens:
            launch(x[:size], *arguments)
        prepared[size] = plans.setdefault(plan, launch)
    return prepared[bucket(tokens)]


def _plan(layer: _Layer, tokens: int) -> tuple[object, Launch]:
    device, bits, sizes = describe(layer.device), 8 * layer.dtype.itemsize, layer[2:5]
    if layer.stored is not None:
        rounded = plan_quantized(device, bits, tokens, layer.n, layer.ranks)
        stored = (layer.stored, layer.group_size)
        return rounded, quantized(rounded, *sizes, *stored, in_order=layer.in_order)
    if layer.in_order:
        raise ValueError("pifa::linear: out_rows: expected on GPUs beside plain factors, found None.")
    plan = plan_plain(device, bits, tokens, *sizes)
    return plan, decode(plan, *sizes) if isinstance(plan, DecodePlan) else prefill(plan, *sizes)
