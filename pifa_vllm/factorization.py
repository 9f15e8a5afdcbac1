"""PIFA, the pivoting factorisation of a low-rank matrix (arXiv 2501.19090, section 3).

A matrix W [m, n] of rank r has r linearly independent rows, its pivot rows. The other m - r rows are linear
combinations of them, so that W is stored without loss as

    pivot_weight  W_p = W[pivot_rows]     [r, n]
    coefficients  C,  W[others] = C W_p   [m - r, r]

which is r(m + n) - r² numbers, where the two factors of plain low rank need r(m + n). Columns do as well, with as
many numbers:

    pivot_weight  W_c = W[:, pivot_columns]     [m, r]
    coefficients  B,  W[:, others] = W_c B      [r, n - r]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def pifa_parameters(m: int, n: int, rank: int) -> int:
    """Count the numbers that PIFA stores for an [m, n] matrix of this rank: r(m + n) - r²."""
    return rank * (m + n) - rank * rank


def lowrank_parameters(m: int, n: int, rank: int) -> int:
    """Count the numbers that two plain factors [m, r] and [r, n] store: r(m + n)."""
    return rank * (m + n)


def pifa_rank(m: int, n: int, density: float) -> int:
    """Return the largest rank whose PIFA form keeps at most `density` · m · n numbers.

    It solves r(m + n) - r² ≤ ρ m n exactly; density 1 gives min(m, n), a matrix that stays dense.

    Raises:
        ValueError: if `density` is not in [0, 1].
    """
    _check_density(density)
    # A density that was itself such a count over m · n means that count, however it was rounded.
    budget = density * m * n + 1e-6
    total = m + n
    rank = int((total - math.sqrt(max(total * total - 4.0 * budget, 0.0))) / 2.0)
    rank = min(rank, m, n)
    # The square root is rounded: settle the last unit in integers.
    while rank < min(m, n) and pifa_parameters(m, n, rank + 1) <= budget:
        rank += 1
    while rank > 0 and pifa_parameters(m, n, rank) > budget:
        rank -= 1
    return rank


def lowrank_rank(m: int, n: int, density: float) -> int:
    """Return the largest rank whose two plain factors keep at most `density` · m · n numbers."""
    _check_density(density)
    return min(int((density * m * n + 1e-6) / (m + n)), m, n)


@dataclass(frozen=True)
class PIFA:
    """A matrix [m, n] of rank r in pivoting form.

    Attributes:
        pivot_weight: [r, n], the pivot rows.
        coefficients: [m - r, r], the remaining rows, in ascending order, as combinations of the pivot rows.
        pivot_rows: int32 [r], strictly increasing indices of the pivot rows in the full matrix.
    """

    pivot_weight: Tensor
    coefficients: Tensor
    pivot_rows: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the full matrix."""
        rank, n = self.pivot_weight.shape
        return self.coefficients.shape[0] + rank, n

    @property
    def rank(self) -> int:
        """r, the number of pivot rows."""
        return self.pivot_weight.shape[0]

    @property
    def parameters(self) -> int:
        """Kept numbers, r(m + n) - r²."""
        return self.pivot_weight.numel() + self.coefficients.numel()

    @property
    def max_coefficient(self) -> float:
        """max |C|, 0 when there are no coefficients. Small values keep 16-bit storage accurate."""
        return _largest(self.coefficients)

    def to(self, dtype: torch.dtype) -> PIFA:
        """Round both factors to a storage dtype."""
        return PIFA(self.pivot_weight.to(dtype), self.coefficients.to(dtype), self.pivot_rows)

    def dense(self) -> Tensor:
        """Rebuild the full matrix [m, n] in the dtype of `pivot_weight`."""
        m, n = self.shape
        weight = self.pivot_weight.new_empty(m, n)
        pivots = self.pivot_rows.long()
        weight[pivots] = self.pivot_weight
        weight[remaining_rows(pivots, m)] = self.coefficients @ self.pivot_weight
        return weight


@dataclass(frozen=True)
class PivotColumns:
    """A matrix [m, n] of rank r in pivoting form by columns: W x = W_c (x_p + B x_r).

    Where m > n its coefficients are fewer than those of rows, and whoever has some of the outputs needs some rows
    of W_c, but no others' y_p.

    Attributes:
        pivot_weight: [m, r], the pivot columns.
        coefficients: [r, n - r], the remaining columns, in ascending order, as combinations of the pivot columns.
        pivot_columns: int32 [r], strictly increasing indices of the pivot columns in the full matrix.
    """

    pivot_weight: Tensor
    coefficients: Tensor
    pivot_columns: Tensor

    @property
    def rank(self) -> int:
        """r, the number of pivot columns."""
        return self.pivot_weight.shape[1]

    @property
    def max_coefficient(self) -> float:
        """max |B|, 0 when there are no coefficients."""
        return _largest(self.coefficients)

    def to(self, dtype: torch.dtype) -> PivotColumns:
        """Round both factors to a storage dtype."""
        return PivotColumns(self.pivot_weight.to(dtype), self.coefficients.to(dtype), self.pivot_columns)

    def dense(self) -> Tensor:
        """Rebuild the full matrix [m, n] in the dtype of `pivot_weight`."""
        return PIFA(self.pivot_weight.T, self.coefficients.T, self.pivot_columns).dense().T


def by_columns(factors: PIFA) -> PivotColumns:
    """Choose pivot columns of a matrix that has pivot rows, without loss; in float64."""
    rank, m = factors.rank, factors.shape[0]
    pivots = factors.pivot_rows.long()
    rows = factors.coefficients.new_zeros(m, rank, dtype=torch.float64)
    rows[pivots] = torch.eye(rank, dtype=torch.float64, device=rows.device)
    rows[remaining_rows(pivots, m)] = factors.coefficients.double()
    found = factorize(factors.pivot_weight.T, rows.T)
    weight, coefficients = found.pivot_weight.T.contiguous(), found.coefficients.T.contiguous()
    return PivotColumns(weight, coefficients, found.pivot_rows)


def remaining_rows(pivot_rows: Tensor, m: int) -> Tensor:
    """Return the indices in [0, m) that are no pivot rows, ascending, int64 [m - r]."""
    keep = torch.ones(m, dtype=torch.bool, device=pivot_rows.device)
    keep[pivot_rows.long()] = False
    return keep.nonzero().squeeze(1)


def factorize(u: Tensor, v: Tensor, *, max_coefficient: float = 1.05) -> PIFA:
    """Bring W = U V into pivoting form without ever forming W.

    V is orthonormalised first and its triangular factor moved into U, so that the rows of U carry the
    geometry of the rows of W and pivots can be chosen on the [m, r] matrix alone. LU with partial pivoting
    gives pivots with a well-conditioned U[pivots]; swaps in the manner of maxvol (Goreinov et al., 2010) then
    bound |C|.

    Args:
        u: [m, r], any floating dtype; computed in float64.
        v: [r, n].
        max_coefficient: bound on |C| that the swaps aim for; 1 is the best that is always attainable.

    Returns:
        The factorisation in float64, of rank at most r: directions that are null to float64 rounding are
        dropped, so a rank-deficient product gets fewer pivot rows than U has columns.

    Raises:
        ValueError: if the shapes do not match, or either factor is not finite.
    """
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
        raise ValueError(f"factors must be [m, r] and [r, n], found {list(u.shape)} and {list(v.shape)}")
    if max_coefficient < 1.0:
        raise ValueError(f"max_coefficient must be at least 1, found {max_coefficient}")
    u, v = u.to(torch.float64), v.to(torch.float64)
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("the factors contain NaN or infinity")
    m, n = u.shape[0], v.shape[1]

    # V = Tᵀ Q with orthonormal rows Q, so U V = (U Tᵀ) Q.
    q, t = torch.linalg.qr(v.T)  # [n, k], [k, r] with k = min(n, r)
    left = u @ t.T  # [m, k]
    left, q = _drop_null_directions(left, q)
    rank = left.shape[1]
    if rank == 0:
        empty = torch.empty(0, dtype=torch.int32, device=u.device)
        return PIFA(v.new_empty(0, n), v.new_empty(m, 0), empty)

    order, coefficients = _bound_coefficients(left, _lu_order(left), rank, max_coefficient)

    # Both parts go into ascending row order, the order of the checkpoint format.
    pivot_rows, by_pivot = order[:rank].sort()
    _, by_rest = order[rank:].sort()
    coefficients = coefficients[by_rest][:, by_pivot].contiguous()
    return PIFA(left[pivot_rows] @ q.T, coefficients, pivot_rows.to(torch.int32))


def _check_density(density: float) -> None:
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be in [0, 1], found {density}")


def _largest(coefficients: Tensor) -> float:
    return float(coefficients.abs().max()) if coefficients.numel() else 0.0


def _drop_null_directions(left: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Cut [m, k] · [n, k]ᵀ to its numerical rank; a no-op (no SVD) where the rank is full."""
    m, k = left.shape
    if k == 0 or m == 0:
        return left[:, :0], q[:, :0]
    if k <= m:
        diagonal = torch.linalg.qr(left, mode="r").R.diagonal().abs()
        # |R_kk| bounds the smallest singular value only loosely from above, hence the wide margin.
        if float(diagonal.min()) > 1e-9 * float(diagonal.max()):
            return left, q
    a, s, bh = torch.linalg.svd(left, full_matrices=False)
    rank = int((s > s[0] * max(m, k) * torch.finfo(s.dtype).eps).sum()) if float(s[0]) > 0 else 0
    return a[:, :rank] * s[:rank], q @ bh[:rank].T


def _lu_order(left: Tensor) -> Tensor:
    """Order the rows as LU with partial pivoting takes them, int64 [m]; the first k are the pivots."""
    _, pivots = torch.linalg.lu_factor(left)  # 1-based successive swaps, int32 [k]
    order = list(range(left.shape[0]))
    for i, p in enumerate(pivots.tolist()):
        order[i], order[p - 1] = order[p - 1], order[i]
    return torch.tensor(order, device=left.device)


def _bound_coefficients(left: Tensor, order: Tensor, rank: int, bound: float) -> tuple[Tensor, Tensor]:
    """Swap rows until |C| ≤ bound; returns the new order [m] and C [m - r, r] in that order.

    Exchanging pivot j with row i multiplies the volume of the pivot block by |C_ij|, so each swap with
    |C_ij| > bound grows it by that factor, and the process ends. C is updated by a rank-one correction and
    recomputed at the end, which removes the rounding that the updates collected.
    """
    m = left.shape[0]
    order = order.clone()
    if rank == m:
        return order, left.new_empty(0, rank)
    swapped = False
    coefficients = _solve_coefficients(left, order, rank)
    for _ in range(4 * rank + 16):
        flat = int(coefficients.abs().argmax())
        i, j = divmod(flat, rank)
        peak = coefficients[i, j].clone()
        if abs(float(peak)) <= bound:
            break
        swapped = True
        column = coefficients[:, j].clone()
        row = coefficients[i].clone()
        # Sherman-Morrison for the exchange of pivot j and row i.
        row[j] -= 1.0
        column[i] += 1.0
        coefficients -= torch.outer(column, row) / peak
        order[[j, rank + i]] = order[[rank + i, j]]
    return order, _solve_coefficients(left, order, rank) if swapped else coefficients


def _solve_coefficients(left: Tensor, order: Tensor, rank: int) -> Tensor:
    pivots, rest = left[order[:rank]], left[order[rank:]]
    coefficients: Tensor = torch.linalg.solve(pivots, rest, left=False)  # C · U[pivots] = U[others]
    return coefficients
