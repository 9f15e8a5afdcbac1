"""The low-rank solvers against brute force: optimality, and exactness where the rank allows it."""

import pytest
import torch

from pifa_vllm.compression.lowrank import (
    alternating_update,
    output_error,
    target_cross,
    truncated_svd,
    whitened_svd,
)

SHAPES = [(1, 1), (1, 5), (5, 1), (7, 5), (5, 7), (24, 24), (123, 5), (40, 17), (17, 40)]


def problem(m: int, n: int, tokens: int = 400, seed: int = 0):
    """Correlated inputs, a weight, and the moments of a drifted second flow."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.logspace(
        0, -2, n, dtype=torch.float64
    )
    x_o = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ mixing.T
    x = x_o + 0.1 * torch.randn(tokens, n, generator=g, dtype=torch.float64) @ mixing.T
    weight = torch.randn(m, n, generator=g, dtype=torch.float64)
    return weight, x_o, x, x.T @ x / tokens, x_o.T @ x / tokens


def loss(weight, u, v, x, y):
    return float(((y - x @ (u @ v).T) ** 2).sum() / y.shape[0])


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_whitened_svd_is_the_optimum_in_the_inputs_metric(m, n):
    weight, _, x, gram, _ = problem(m, n)
    rank = max(1, min(m, n) // 2)
    u, v = whitened_svd(weight, gram, rank, ridge=0.0)
    # The optimum's loss by definition: the tail of the singular values of W L.
    tail = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram))[rank:].square().sum()
    found = loss(weight, u, v, x, x @ weight.T)
    assert found == pytest.approx(float(tail), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("m", "n"), [(24, 24), (40, 17), (17, 40)])
def test_the_papers_update_beats_plain_whitening_on_its_target(m, n):
    weight, x_o, x, gram, cross = problem(m, n)
    target = target_cross(weight, gram, cross, 0.25)
    y = (x + 0.25 * (x_o - x)) @ weight.T
    paper = loss(weight, *alternating_update(weight, gram, target, 6, 1e-9), x, y)
    assert paper < loss(weight, *whitened_svd(weight, gram, 6, 1e-9), x, y)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_reproduces_the_weight_when_both_flows_agree(m, n):
    weight, _, _, gram, _ = problem(m, n)
    rank = min(m, n)
    target = target_cross(weight, gram, gram, 0.25)
    for u, v in (
        truncated_svd(weight, rank),
        whitened_svd(weight, gram, rank, 1e-6),
        alternating_update(weight, gram, target, rank, 1e-6),
    ):
        assert float((u @ v - weight).norm() / weight.norm()) < 1e-7


@pytest.mark.parametrize(("m", "n"), [(40, 17), (17, 40)])
def test_singular_moments_give_finite_factors(m, n):
    weight = problem(m, n)[0]
    x = torch.randn(3, n, dtype=torch.float64)  # fewer tokens than features
    gram = x.T @ x / 3
    target = target_cross(weight, gram, gram, 0.25)
    for ridge in (0.0, 1e-12, 1e-2):
        for u, v in (
            whitened_svd(weight, gram, 3, ridge),
            alternating_update(weight, gram, target, 3, ridge),
        ):
            assert torch.isfinite(u).all()
            assert torch.isfinite(v).all()
            # Three tokens span a space that rank 3 covers: the outputs on them are exact.
            assert float((x @ (u @ v - weight).T).norm() / (x @ weight.T).norm()) < 1e-2


def test_inputs_that_are_all_zero_give_finite_factors():
    weight, gram = torch.randn(6, 4), torch.zeros(4, 4)
    target = target_cross(weight, gram, gram, 0.25)
    for u, v in (
        whitened_svd(weight, gram, 2, 1e-6),
        alternating_update(weight, gram, target, 2, 1e-3),
    ):
        assert torch.isfinite(u @ v).all()


def test_output_error_is_the_relative_error_on_the_inputs():
    weight, _, x, gram, _ = problem(9, 7)
    other = weight + 0.1 * torch.randn(9, 7, dtype=torch.float64)
    direct = float((x @ (weight - other).T).norm() / (x @ weight.T).norm())
    assert output_error(weight, other, gram) == pytest.approx(direct, rel=1e-9)
    assert output_error(weight, weight, gram) == 0.0
    assert output_error(weight, other, torch.zeros(7, 7)) == 0.0
