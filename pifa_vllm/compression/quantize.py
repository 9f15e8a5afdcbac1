"""Quantizing a module so that what is rounded later makes up for what was rounded before.

GPTQ (arXiv 2210.17323) rounds a matrix column by column and moves each column's error onto those that are left, in
the metric G of the inputs. In pivoting form the rows of W_p depend on one another in the same way: the error of a
pivot output reaches the other outputs times C. So the rows are taken in blocks, and the error of a block moves onto
the rows that are left, in the metric R = I + CᵀC of what the outputs make of y_p. C is then fitted anew to the W_p
that there is, and rounded in the metric of its own inputs, Ŵ_p G Ŵ_pᵀ.

With pivot columns the rows of W_c are independent, in the metric of their inputs x_p + B x_r. B is then fitted
anew and rounded in the metric of x_r, its rows in that of what W_c makes of them, W_cᵀ W_c.

What the outputs are to be may also correct the errors that the inputs bring from modules before: rounding them all
adds up as cutting ranks does, and M (`pifa_vllm.compression.correction`) stops it in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pifa_vllm.checkpoint import FactorFormat
from pifa_vllm.compression.lowrank import regularised
from pifa_vllm.factorization import PIFA, PivotColumns, remaining_rows
from pifa_vllm.ops import column_order
from pifa_vllm.quantization import (
    Quantized,
    QuantizedPIFA,
    fit_scales,
    groups,
    pack,
    round_to,
    row_width,
    spread,
)

# Of the metrics, in units of their mean diagonal, as GPTQ has it.
_DAMPING = 0.01
# Of the least squares for C: they only have to be solvable.
_FIT_RIDGE = 1e-6
# Shares of a group's largest value that 4-bit numbers may end at; 8 bits lose more by cutting off than they win.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Columns whose errors move on together, and blocks of rows.
_COLUMNS = 128
_ROW_BLOCKS = 16


def quantize_factors(factors: PIFA, target: Tensor, gram: Tensor, kind: FactorFormat) -> QuantizedPIFA:
    """Quantize a module in pivoting form.

    Args:
        factors: of a matrix [m, n], in float64; which rows are pivots, and how far their errors reach.
        target: W [m, n], float64: what the outputs are to be, the matrix itself or one that also corrects errors of
            the inputs.
        gram: G = E[x xᵀ] [n, n], float64.
        kind: of both factors' numbers.
    """
    coefficients, rows = factors.coefficients, factors.pivot_rows.long()
    identity = torch.eye(factors.rank, dtype=gram.dtype, device=gram.device)
    reach = identity + coefficients.T @ coefficients
    pivots = round_matrix(target[rows], gram, kind.dtype, kind.group, reach)
    found = pivots.values().double()
    inner = regularised(found @ gram @ found.T, _FIT_RIDGE)
    cross = target[remaining_rows(rows, len(target))] @ gram @ found.T  # [m - r, r]
    fitted = torch.linalg.solve(inner, cross, left=False)
    rest = round_matrix(fitted, inner, kind.coefficient_dtype, kind.group)
    return QuantizedPIFA(pivots, rest, factors.pivot_rows)


def quantize_columns(
    factors: PivotColumns, target: Tensor, gram: Tensor, kind: FactorFormat
) -> QuantizedPIFA:
    """Quantize a module with pivot columns; the arguments are those of `quantize_factors`."""
    coefficients, pivots = factors.coefficients, factors.pivot_columns
    rank = len(pivots)
    order = column_order(pivots, len(gram)).long()
    metric, wanted = gram[order][:, order], target[:, order]
    both = torch.cat([torch.eye(rank, dtype=gram.dtype, device=gram.device), coefficients], dim=1)  # [r, n]
    inner = both @ metric @ both.T  # of x_p + B x_r
    fitted = torch.linalg.solve(regularised(inner, _FIT_RIDGE), wanted @ metric @ both.T, left=False)
    found = round_matrix(fitted, inner, kind.dtype, kind.group)
    kept, rest = found.values().double(), metric[rank:, rank:]
    # What W_c lost on x_p, as far as x_r tells it, B can give back.
    lost = (wanted[:, :rank] - kept) @ metric[:rank, rank:]
    lost = torch.linalg.solve(regularised(rest, _FIT_RIDGE), lost, left=False)
    outputs = regularised(kept.T @ kept, _FIT_RIDGE)
    refitted = torch.linalg.solve(outputs, kept.T @ (wanted[:, rank:] + lost))
    others = round_matrix(refitted, rest, kind.coefficient_dtype, kind.group, outputs)
    return QuantizedPIFA(found, others, pivots, columns=True)


def round_matrix(
    matrix: Tensor, metric: Tensor, dtype: torch.dtype, group_size: int, rows: Tensor | None = None
) -> Quantized:
    """Round a matrix so that tr(R (W - Ŵ) G (W - Ŵ)ᵀ) stays small.

    Args:
        matrix: W [m, k].
        metric: G [k, k].
        dtype: of the numbers.
        group_size: 0 for one scale a row.
        rows: R [m, m]; None for the identity.
    """
    m, k = matrix.shape
    left = matrix.double().clone()
    numbers = torch.empty(m, row_width(k, dtype), dtype=dtype, device=matrix.device)
    scale = torch.empty(m, groups(k, group_size), dtype=torch.float16, device=matrix.device)
    if m > 0 and k > 0:
        damped = regularised(metric.double(), _DAMPING)
        root = _inverse_root(damped).float()
        damped = damped.float()
        row_root = None if rows is None else _inverse_root(regularised(rows.double(), _DAMPING))
        size = m if row_root is None else -(-m // _ROW_BLOCKS)
        for begin in range(0, m, size):
            end = min(begin + size, m)
            block = _round_rows(left[begin:end].float(), damped, root, dtype, group_size)
            numbers[begin:end], scale[begin:end] = block.numbers, block.scale
            if row_root is not None and end < m:
                error = left[begin:end] - block.values()
                own = torch.linalg.solve_triangular(row_root[begin:end, begin:end].T, error, upper=False)
                left[end:] -= row_root[begin:end, end:].T @ own
    return Quantized(numbers, scale, k, group_size)


def _inverse_root(metric: Tensor) -> Tensor:
    """Upper U with metric⁻¹ = Uᵀ U."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    return torch.linalg.cholesky(inverse, upper=True)  # type: ignore[no-any-return]  # torch has no annotations here


def _round_rows(
    values: Tensor, metric: Tensor, root: Tensor, dtype: torch.dtype, group_size: int
) -> Quantized:
    """GPTQ of rows that do not depend on one another."""
    rows, k = values.shape
    weights = metric.diagonal()
    left = values.clone()
    numbers = torch.empty_like(values)
    scales = [] if group_size else [_best_scale(values, weights, dtype)]
    step = group_size or _COLUMNS
    for begin in range(0, k, step):
        end = min(begin + step, k)
        if group_size:
            scales.append(_best_scale(left[:, begin:end], weights[begin:end], dtype))
        scale = scales[-1][:, 0].float()
        errors = values.new_empty(rows, end - begin)
        for i in range(begin, end):
            numbers[:, i] = round_to(left[:, i], scale, dtype)
            errors[:, i - begin] = (left[:, i] - numbers[:, i] * scale) / root[i, i]
            left[:, i:end] -= errors[:, i - begin, None] * root[i, i:end]
        left[:, end:] -= errors @ root[begin:end, end:]
    found = torch.cat(scales, dim=1)
    if dtype == torch.uint8:
        _settle(numbers, spread(found, k, group_size), values, metric)
    return Quantized(pack(numbers, dtype), found, k, group_size)


def _settle(numbers: Tensor, scale: Tensor, values: Tensor, metric: Tensor) -> None:
    """Round every number once more, in place, now that all others are known: one pass of coordinate descent."""
    kept = numbers * scale
    pull = (values - kept) @ metric
    for i in range(values.shape[1]):
        numbers[:, i] = round_to(kept[:, i] + pull[:, i] / metric[i, i], scale[:, i], torch.uint8)
        moved = numbers[:, i] * scale[:, i] - kept[:, i]
        pull -= moved[:, None] * metric[i]


def _best_scale(values: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Of one group: float16 [rows, 1]."""
    best = fit_scales(values, dtype, 0)
    if dtype != torch.uint8:
        return best
    largest = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    least = values.new_full((len(values),), float("inf"))
    for clip in _CLIPS:
        scale = fit_scales(values, dtype, 0, clip)
        # With this sign the largest value is a multiple of -8, of which there is one more.
        for candidate in (scale, scale * torch.where(largest > 0, -7 / 8, 7 / 8).to(scale.dtype)):
            found = round_to(values, candidate.float(), dtype) * candidate
            error = ((found - values).square() * weights).sum(dim=1)
            best = torch.where((error < least)[:, None], candidate, best)
            least = torch.minimum(error, least)
    return best
