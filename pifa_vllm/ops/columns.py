"""Products that are several of `pifa::linear`, or one without any factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pifa_vllm.factorization import remaining_rows
from pifa_vllm.ops.linear import pifa_linear


class Matrix(NamedTuple):
    """A matrix [m, k] as it is stored.

    Attributes:
        numbers: [m, k], or quantized ones [m, row_width(k)].
        scale: float16 [m, groups(k)], if they are quantized.
        group_size: numbers of a row that share a scale, 0 for all of them.
    """

    numbers: Tensor
    scale: Tensor | None = None
    group_size: int = 0


def dense(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., k] by a matrix [m, k]: to the kernels one that is all pivot rows, in order."""
    weight, scale, group_size = matrix
    m = weight.shape[0]
    if m == 0 or weight.shape[1] == 0:
        y = x.new_zeros((*x.shape[:-1], m))
        return y if bias is None else y + bias
    no_scale = None if scale is None else scale.new_empty(0)
    return pifa_linear(x, weight, weight.new_empty(0), None, [m], [m], bias, scale, no_scale, group_size)


def pivot_columns_linear(
    x: Tensor, pivot_weight: Matrix, coefficients: Matrix, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute y = W_c (x_p + B x_r) + b for a matrix with pivot columns (`factorization.PivotColumns`).

    Two products with dense matrices: no output has to be put anywhere but where it comes out.

    Args:
        x: [..., n].
        pivot_weight: W_c [m, r], or some of its rows.
        coefficients: B [r, n - r].
        order: int [n], see `column_order`.
        bias: [m] or None.

    Returns:
        [..., m] in the dtype of x.
    """
    rank = coefficients.numbers.shape[0]
    ordered = x.index_select(-1, order)
    pivots = ordered[..., :rank] + dense(ordered[..., rank:], coefficients)  # [..., r]
    return dense(pivots, pivot_weight, bias)


def column_order(pivot_columns: Tensor, n: int) -> Tensor:
    """List the pivot columns, then the remaining ones, each in ascending order: int32 [n]."""
    return torch.cat([pivot_columns.long(), remaining_rows(pivot_columns, n)]).to(torch.int32)
