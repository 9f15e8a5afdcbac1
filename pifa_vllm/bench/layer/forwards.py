"""What is timed on a layer, on CPUs and GPUs, with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.checkpoint import FactorFormat
from pifa_vllm.factorization import remaining_rows
from pifa_vllm.ops import Matrix, column_order, pifa_linear, pivot_columns_linear, stacked_rows
from pifa_vllm.quantization import round_to_nearest

_MAX_COPIES = 64

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """Something to time.

    Attributes:
        name: in the results.
        dtype: of activations, and of weights that are not quantized.
        parameters: numbers that it multiplies with.
        make: makes one instance with weights of its own.
        bits: of a number, on average and with its scale; None for those of the dtype.
    """

    name: str
    dtype: torch.dtype
    parameters: int
    make: Callable[[], Forward]
    bits: float | None = None

    @property
    def nbytes(self) -> float:
        """Of its numbers."""
        return self.parameters * (8 * self.dtype.itemsize if self.bits is None else self.bits) / 8

    def copies(self, working_set: int) -> list[Forward]:
        """Make instances whose weights take so many bytes together."""
        copies = math.ceil(working_set / max(self.nbytes, 1))
        return [self.make() for _ in range(max(1, min(_MAX_COPIES, copies)))]


def random_matrix(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """[rows, columns] that keeps the scale of what it is multiplied with."""
    scale: float = max(columns, 1) ** -0.5
    return (torch.randn(rows, columns, device=device) * scale).to(dtype)


def dense(shape: LayerShape, dtype: torch.dtype, device: str = "cpu") -> Forward:
    """F.linear."""
    weight = random_matrix(shape.m, shape.n, dtype, device)
    return lambda x: linear(x, weight)


def pifa(shape: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Forward:
    """`pifa::linear`."""
    pivot_weights, coefficients, pivots = zip(*_factors(shape, ranks, dtype, device), strict=True)
    rows = stacked_rows(pivots, shape.out_features)
    stacked, flat = torch.cat(pivot_weights), torch.cat([c.flatten() for c in coefficients])
    return lambda x: pifa_linear(x, stacked, flat, rows, ranks, shape.out_features)


def quantized(shape: LayerShape, ranks: Sequence[int], kind: FactorFormat, device: str = "cpu") -> Forward:
    """`pifa::linear` with quantized factors; with pivot columns where each module has more outputs than inputs."""
    if min(shape.out_features) > shape.n:
        modules = [
            (
                column_order(torch.randperm(shape.n, device=device)[:r].sort().values, shape.n),
                _matrix(m, r, kind.dtype, kind.group, device),
                _matrix(r, shape.n - r, kind.coefficient_dtype, kind.group, device),
            )
            for r, m in zip(ranks, shape.out_features, strict=True)
        ]
        return lambda x: torch.cat([pivot_columns_linear(x, w, b, order) for order, w, b in modules], dim=-1)
    _, _, pivots = zip(*_factors(shape, ranks, torch.float32, device), strict=True)
    rows = stacked_rows(pivots, shape.out_features)
    weight, scale, group = _matrix(sum(ranks), shape.n, kind.dtype, kind.group, device)
    rest = [
        _matrix(m - r, r, kind.coefficient_dtype, kind.group, device)
        for r, m in zip(ranks, shape.out_features, strict=True)
    ]
    flat = torch.cat([c.numbers.flatten() for c in rest])
    scales = torch.cat([c.scale.flatten() for c in rest if c.scale is not None])
    return lambda x: pifa_linear(x, weight, flat, rows, ranks, shape.out_features, None, scale, scales, group)


def _matrix(rows: int, k: int, dtype: torch.dtype, group: int, device: str) -> Matrix:
    found = round_to_nearest(random_matrix(rows, k, torch.float32, device), dtype, group)
    return Matrix(found.numbers, found.scale, group)


def reference(shape: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Forward:
    """What the paper's implementation runs, two F.linear and two index_copy_ per module."""
    modules = [
        (w, c, pivots, remaining_rows(pivots, m))
        for (w, c, pivots), m in zip(_factors(shape, ranks, dtype, device), shape.out_features, strict=True)
    ]

    def module(x: Tensor, w: Tensor, c: Tensor, pivots: Tensor, rest: Tensor) -> Tensor:
        y_p = linear(x, w)
        y_np = linear(y_p, c)
        y = x.new_empty(*x.shape[:-1], pivots.numel() + rest.numel())
        return y.index_copy_(-1, pivots, y_p).index_copy_(-1, rest, y_np)

    if len(modules) == 1:
        return lambda x: module(x, *modules[0])
    # One module after another, as an unfused model runs them; a caller gets one output each.
    return lambda x: torch.cat([module(x, *parts) for parts in modules], dim=-1)


def _factors(
    shape: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each module: pivot weight [r, n], coefficients [m - r, r], pivot rows int64 [r]."""
    return [
        (
            random_matrix(r, shape.n, dtype, device),
            random_matrix(m - r, r, dtype, device),
            torch.randperm(m, device=device)[:r].sort().values,
        )
        for r, m in zip(ranks, shape.out_features, strict=True)
    ]
