"""The cross-fitted correction of mpifa-exact: what it finds, and what it refuses to find."""

import pytest
import torch

from pifa_vllm.compression.correction import fit_correction
from pifa_vllm.compression.lowrank import alternating_update, target_cross, whitened_svd
from pifa_vllm.compression.moments import Moments

M, N = 12, 10


def flows(samples: int, noise: float, *, lost: float = 0.0, seed: int = 0):
    """Dense inputs, compressed inputs that distort them linearly and by noise, and what the stream has lost."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, N)
    distort = torch.eye(N) + 0.2 * torch.randn(N, N, generator=torch.Generator().manual_seed(7))
    writes = torch.randn(M, N, generator=torch.Generator().manual_seed(8))
    x_o = torch.randn(samples, 16, N, generator=g) * scale
    x = x_o @ distort.T + noise * torch.randn(samples, 16, N, generator=g) * scale
    drift = lost * (x @ writes.T) + 0.1 * torch.randn(samples, 16, M, generator=g)
    return x_o, x, drift


def moments_of(x_o, x, drift=None):
    moments = Moments(N, torch.device("cpu"), stream=None if drift is None else M, folds=2)
    for i in range(x.shape[0]):
        moments.add(x_o[i], x[i], None if drift is None else drift[i])
    return moments


def weight():
    return torch.randn(M, N, generator=torch.Generator().manual_seed(1))


def unseen_loss(solution, noise, lost=0.0):
    x_o, x, drift = flows(200, noise, lost=lost, seed=99)
    y = x_o.double() @ weight().double().T + (drift.double() if lost else 0.0)
    return float((y - x.double() @ solution.T).square().mean())


def test_a_systematic_error_is_corrected_almost_fully():
    found = fit_correction(weight(), moments_of(*flows(100, 0.05)[:2]), 1.0, 0.0)
    assert found.shrinkage > 0.95
    plain = unseen_loss(weight().double(), 0.05)
    assert unseen_loss(weight().double() + found.delta, 0.05) < 0.1 * plain


def test_what_is_only_noise_is_left_alone():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 16, N, generator=g)
    pure_noise = torch.randn(4, 16, M, generator=g)
    found = fit_correction(weight(), moments_of(x, x, pure_noise), 1.0, 1.0)
    fitted = (pure_noise.reshape(-1, M).T @ x.reshape(-1, N)) @ torch.linalg.inv(
        x.reshape(-1, N).T @ x.reshape(-1, N)
    )
    assert float(found.delta.norm()) < 0.5 * float(fitted.norm())


def test_few_samples_shrink_it_and_it_is_never_worse_than_a_full_fit_on_unseen_tokens():
    """Small calibration sets are where the plain least-squares correction overfits."""
    noise, better = 1.0, 0
    for seed in range(10):
        x_o, x, _ = flows(2, noise, seed=seed)
        moments = moments_of(x_o, x)
        found = fit_correction(weight(), moments, 1.0, 0.0)
        gram, cross = moments.gram(), moments.cross()
        full = weight().double() @ (cross - gram) @ torch.linalg.inv(gram)
        better += unseen_loss(weight().double() + found.delta, noise) <= unseen_loss(
            weight().double() + full, noise
        )
        assert 0.0 <= found.shrinkage <= 1.0
    assert better >= 8


def test_feedback_aims_at_the_dense_residual_stream():
    x_o, x, drift = flows(60, 0.1, lost=0.5)

    def loss(feedback):
        found = fit_correction(weight(), moments_of(x_o, x, drift), 1.0, feedback)
        return unseen_loss(weight().double() + found.delta, 0.1, lost=0.5)

    assert loss(1.0) < loss(0.5) < loss(0.0)


def test_rank_reduction_after_it_beats_the_papers_update():
    """Reduced-rank regression is the optimum of the objective that the paper's two steps approach."""
    x_o, x, _ = flows(100, 0.05)
    moments = moments_of(x_o, x)
    found = fit_correction(weight(), moments, 1.0, 0.0)
    u, v = whitened_svd(weight().double() + found.delta, moments.gram(), 5, 1e-6)
    target = target_cross(weight(), moments.gram(), moments.cross(), 1.0)
    paper_u, paper_v = alternating_update(weight(), moments.gram(), target, 5, 1e-6)
    assert unseen_loss(u @ v, 0.05) <= unseen_loss(paper_u @ paper_v, 0.05) * 1.001


@pytest.mark.parametrize("samples", [1, 2])
def test_equal_flows_and_an_empty_half_need_no_correction(samples):
    # Small integers: their sums are exact in any order, so equal flows have equal moments.
    x = torch.randint(-8, 9, (samples, 16, N)).float()
    found = fit_correction(weight(), moments_of(x, x), 1.0, 1.0)
    assert found.shrinkage == 0.0
    assert torch.equal(found.delta, torch.zeros(M, N, dtype=torch.float64))


def test_inputs_that_are_all_zero_give_a_finite_answer():
    zero = torch.zeros(2, 16, N)
    assert torch.isfinite(fit_correction(weight(), moments_of(zero, zero), 1.0, 1.0).delta).all()
