"""PIFA is lossless to rounding, costs r(m + n) - r² numbers, and keeps its coefficients small."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pifa_vllm.factorization import (
    PIFA,
    by_columns,
    factorize,
    lowrank_parameters,
    lowrank_rank,
    pifa_parameters,
    pifa_rank,
)

quick = settings(max_examples=50, deadline=None)
extents = st.integers(1, 48)
seeds = st.integers(0, 2**31 - 1)
ODD_SHAPES = [
    (1, 1, 1),
    (1, 5, 1),
    (5, 1, 1),
    (5, 123, 5),
    (123, 5, 5),
    (123, 123, 123),
    (123, 40, 17),
    (40, 123, 17),
    (64, 64, 64),
    (3, 3, 2),
]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conditioned(m: int, n: int, condition: float, seed: int) -> Tensor:
    """A random [m, n] matrix whose singular values decay from 1 to 1 / condition."""
    q, _ = torch.linalg.qr(gaussian(m, min(m, n), seed=seed))
    p, _ = torch.linalg.qr(gaussian(n, min(m, n), seed=seed + 1))
    return (q * torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64)) @ p.T


def relative_error(factors: PIFA, weight: Tensor) -> float:
    return float((factors.dense() - weight).norm() / weight.norm())


def check_form(factors: PIFA, m: int, n: int, rank: int) -> None:
    """What holds of every factorisation, whatever its values are."""
    assert factors.shape == (m, n)
    assert factors.rank == rank
    assert factors.pivot_weight.shape == (rank, n)
    assert factors.coefficients.shape == (m - rank, rank)
    assert factors.pivot_rows.dtype == torch.int32
    assert factors.pivot_rows.shape == (rank,)
    rows = factors.pivot_rows.tolist()
    assert rows == sorted(set(rows))
    assert all(0 <= row < m for row in rows)
    assert factors.parameters == pifa_parameters(m, n, rank) == rank * (m + n) - rank**2
    assert factors.parameters <= m * n


@quick
@given(extents, extents, st.integers(1, 48), seeds)
def test_any_factors_are_kept_without_loss(m: int, n: int, inner: int, seed: int) -> None:
    u, v = gaussian(m, inner, seed=seed), gaussian(inner, n, seed=seed + 1)
    factors = factorize(u, v)
    check_form(factors, m, n, min(m, n, inner))
    assert relative_error(factors, u @ v) < 1e-11
    assert factors.max_coefficient <= 1.05 + 1e-9


@pytest.mark.parametrize(("m", "n", "rank"), ODD_SHAPES)
def test_odd_shapes(m: int, n: int, rank: int) -> None:
    u, v = gaussian(m, rank, seed=m), gaussian(rank, n, seed=n)
    factors = factorize(u, v)
    check_form(factors, m, n, rank)
    assert relative_error(factors, u @ v) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_of_any_dtype_are_taken_in_float64(dtype: torch.dtype) -> None:
    u, v = gaussian(20, 6, seed=0).to(dtype), gaussian(6, 30, seed=1).to(dtype)
    factors = factorize(u, v)
    assert factors.pivot_weight.dtype == factors.coefficients.dtype == torch.float64
    assert relative_error(factors, u.double() @ v.double()) < 1e-12


def test_rank_zero() -> None:
    for u, v in ((torch.zeros(7, 3), torch.randn(3, 5)), (torch.empty(7, 0), torch.empty(0, 5))):
        factors = factorize(u, v)
        check_form(factors, 7, 5, 0)
        assert factors.max_coefficient == 0.0
        assert torch.equal(factors.dense(), torch.zeros(7, 5, dtype=torch.float64))


def test_full_rank_has_nothing_but_pivot_rows_when_it_is_wide() -> None:
    weight = gaussian(6, 9, seed=0)
    factors = factorize(torch.eye(6, dtype=torch.float64), weight)
    check_form(factors, 6, 9, 6)
    assert factors.coefficients.numel() == 0
    assert factors.max_coefficient == 0.0
    torch.testing.assert_close(factors.dense(), weight, rtol=0, atol=1e-13)


@quick
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(1, 12), seeds)
def test_rank_deficient_factors_lose_the_null_directions(
    m: int, n: int, rank: int, surplus: int, seed: int
) -> None:
    rank = min(rank, m, n)
    mix = gaussian(rank, rank + surplus, seed=seed)
    u = gaussian(m, rank, seed=seed + 1) @ mix
    v = torch.linalg.pinv(mix) @ gaussian(rank, n, seed=seed + 2)
    factors = factorize(u, v)
    check_form(factors, m, n, rank)
    assert relative_error(factors, u @ v) < 1e-9


def test_duplicate_and_zero_rows() -> None:
    u = gaussian(4, 3, seed=0).repeat_interleave(5, dim=0)
    u[7] = 0
    v = gaussian(3, 10, seed=1)
    factors = factorize(u, v)
    check_form(factors, 20, 10, 3)
    assert relative_error(factors, u @ v) < 1e-13
    assert torch.equal(factors.dense()[7], torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("ill", ["u", "v", "both"])
def test_ill_conditioned_factors(ill: str) -> None:
    m, n, rank = 90, 70, 40
    u, v = gaussian(m, rank, seed=0), gaussian(rank, n, seed=1)
    if ill in ("u", "both"):
        u = conditioned(m, rank, 1e8, seed=2)
    if ill in ("v", "both"):
        v = conditioned(rank, n, 1e8, seed=3)
    factors = factorize(u, v)
    weight = u @ v
    assert relative_error(factors, weight) < 1e-12
    assert factors.max_coefficient <= 1.05 + 1e-6
    # The rank may fall where the product's spectrum ends below rounding, never below what float64 can see.
    spectrum = torch.linalg.svdvals(weight)
    assert factors.rank >= int((spectrum > 1e-13 * spectrum[0]).sum())


@pytest.mark.parametrize("bound", [1.0, 1.05, 2.0])
def test_swaps_bound_the_coefficients_where_lu_alone_does_not(bound: float) -> None:
    # The growth example of partial pivoting: a unit lower triangle of -1 has coefficients up to 2^(r - 1).
    # Just below 1, so that rounding cannot make another row the pivot.
    rank = 24
    u = -0.999 * torch.ones(2 * rank, rank, dtype=torch.float64).tril(-1)
    u[:rank] += torch.eye(rank, dtype=torch.float64)
    v = torch.linalg.qr(gaussian(50, rank, seed=0))[0].T
    factors = factorize(u, v, max_coefficient=bound)
    assert relative_error(factors, u @ v) < 1e-12
    assert factors.max_coefficient <= bound + 1e-9
    assert factorize(u, v, max_coefficient=1e9).max_coefficient > 1e4


# Rounding W_p and C to a dtype with unit roundoff e changes an entry of C W_p by at most about
# (2 e + e²) |C| |W_p|, and |C| ≤ 1.05 sums r terms; the Frobenius bound below is far from that worst case.
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)]
)
def test_storage_dtypes(dtype: torch.dtype, bound: float) -> None:
    u, v = conditioned(256, 64, 1e3, seed=6), gaussian(64, 192, seed=7)
    stored = factorize(u, v).to(dtype)
    assert stored.pivot_weight.dtype == stored.coefficients.dtype == dtype
    assert stored.pivot_rows.dtype == torch.int32
    assert stored.dense().dtype == dtype
    assert relative_error(stored.to(torch.float64), u @ v) < bound


def test_bad_factors_are_refused() -> None:
    u, v = torch.randn(4, 2), torch.randn(2, 4)
    for value in (math.nan, math.inf):
        for spoiled in ((u.clone().fill_(value), v), (u, v.clone().index_fill(0, torch.tensor([1]), value))):
            with pytest.raises(ValueError, match="NaN or infinity"):
                factorize(*spoiled)
    with pytest.raises(ValueError, match=r"found \[4, 2\] and \[3, 4\]"):
        factorize(u, torch.randn(3, 4))
    with pytest.raises(ValueError, match="must be \\[m, r\\]"):
        factorize(u[0], v)
    with pytest.raises(ValueError, match="at least 1"):
        factorize(u, v, max_coefficient=0.5)


@quick
@given(extents, extents, st.floats(0.0, 1.0))
def test_largest_rank_under_the_budget(m: int, n: int, density: float) -> None:
    ranks = range(min(m, n) + 1)
    budget = density * m * n + 1e-6  # a density may be a rounded count
    assert pifa_rank(m, n, density) == max(r for r in ranks if pifa_parameters(m, n, r) <= budget)
    assert lowrank_rank(m, n, density) == max(r for r in ranks if lowrank_parameters(m, n, r) <= budget)


def test_density_one_stays_dense() -> None:
    assert pifa_rank(576, 192, 1.0) == 192
    assert pifa_rank(4096, 11008, 1.0) == 4096
    assert pifa_rank(8, 8, 0.0) == 0


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_impossible_densities_are_refused(density: float) -> None:
    for rank_of in (pifa_rank, lowrank_rank):
        with pytest.raises(ValueError, match="density must be in"):
            rank_of(8, 8, density)


@pytest.mark.parametrize(("m", "n", "rank"), [(9, 5, 3), (5, 9, 3), (4, 4, 4), (1, 7, 1), (6, 5, 0)])
def test_pivot_columns_stand_for_the_same_matrix(m: int, n: int, rank: int) -> None:
    factors = factorize(gaussian(m, rank, seed=0), gaussian(rank, n, seed=1))
    found = by_columns(factors)
    assert found.pivot_weight.shape == (m, rank)
    assert found.coefficients.shape == (rank, n - rank)
    assert found.pivot_columns.tolist() == sorted(set(found.pivot_columns.tolist()))
    dense = factors.dense()
    torch.testing.assert_close(found.dense(), dense)
    torch.testing.assert_close(dense[:, found.pivot_columns.long()], found.pivot_weight)
    if found.coefficients.numel():
        assert float(found.coefficients.abs().max()) <= 1.05
