"""Low-rank approximation of one linear layer in the metric of its inputs.

W is [m, n] and acts on inputs x [n]. The inputs enter only through second moments over the calibration tokens:

    G = E[x xᵀ]     [n, n], x the inputs in the compressed model
    H = E[x_o xᵀ]   [n, n], x_o the inputs of the same tokens in the dense model
    D = E[(h_o - h) xᵀ]   [m, n], what the residual stream has lost where the layer's output is added to it
    S = E[g gᵀ]     [m, m], g the gradient of the dense model's loss at W x (`pifa_vllm.compression.sensitivity`);
                    or its diagonal [m]

All functions compute in float64 and return factors U [m, r], V [r, n] with W' = U V.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
_Map = Callable[[Tensor], Tensor]

# Of S, in units of its mean diagonal. S is of few tokens: a change in directions that it takes for free is not, and
# on SmolLM2-135M cuts did better with 1 than with 0.1. Modules are told apart better with less of it.
OUTPUT_RIDGE = 1.0
ALLOCATION_RIDGE = 0.1


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """Return the rank-r minimiser of ‖W - W'‖, which looks at no inputs.

    Args:
        weight: W [m, n].
        rank: r, at most min(m, n).
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def whitened_svd(
    weight: Tensor, gram: Tensor, rank: int, ridge: float, outputs: Tensor | None = None
) -> Factors:
    """Return the rank-r minimiser of tr(S (W - W') G (W - W')ᵀ).

    With S = 1 it is E‖(W - W') x‖² (SVD-LLM, arXiv 2403.07378); with the gradients' S it is twice what the loss
    rises by, in nats per token, to second order and with inputs and gradients taken for independent (K-FAC, arXiv
    1503.05671).

    Args:
        weight: W [m, n].
        gram: G [n, n].
        rank: r, at most min(m, n).
        ridge: added to G's diagonal, in units of its mean.
        outputs: S [m, m] or [m], to which `OUTPUT_RIDGE` is added likewise; None is the identity.
    """
    metric = regularised(gram.double(), ridge)
    if outputs is None:
        return _project(weight.double(), metric, rank)
    # S = A Aᵀ, and what is cut is Aᵀ W.
    apply, solve = _output_root(outputs, OUTPUT_RIDGE)
    u, v = _project(apply(weight.double()), metric, rank)
    return solve(u), v


def tail_losses(
    weight: Tensor, gram: Tensor, ridge: float, outputs: Tensor, outputs_ridge: float = ALLOCATION_RIDGE
) -> Tensor:
    """What a cut costs at every rank: ½ tr(S (W - W') G (W - W')ᵀ), in nats per token, at the best W' of that rank.

    Args:
        weight: W [m, n].
        gram: G [n, n].
        ridge: added to G's diagonal, in units of its mean.
        outputs: S [m, m] or [m].
        outputs_ridge: added to S's diagonal, likewise.

    Returns:
        float64 [min(m, n) + 1], the loss at ranks 0 to min(m, n), which falls to 0.
    """
    m, n = weight.shape
    metric = regularised(gram.double(), ridge)
    left = _output_root(outputs, outputs_ridge)[0](weight.double())
    if m <= n:
        square = left @ metric @ left.T
    else:
        left = left @ _square_root(metric)[0]
        square = left.T @ left
    energies = torch.linalg.eigvalsh((square + square.T) / 2).clamp(min=0.0)  # σ², ascending
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)]) / 2


def _output_root(outputs: Tensor, ridge: float) -> tuple[_Map, _Map]:
    """b ↦ Aᵀ b and b ↦ A⁻ᵀ b for S + αI = A Aᵀ."""
    if outputs.ndim == 1:
        root = (outputs.double() + _alpha(outputs, ridge)).sqrt()[:, None]  # [m, 1]
        return lambda b: root * b, lambda b: b / root
    root, solve = _square_root(regularised(outputs.double(), ridge))
    return lambda b: root.T @ b, solve


def target_cross(weight: Tensor, gram: Tensor, cross: Tensor, mix: float) -> Tensor:
    """Return E[y xᵀ] [m, n] for M's target y = W((1 - λ) x + λ x_o) (MPIFA, section 4).

    Args:
        weight: W [m, n].
        gram: G [n, n].
        cross: H [n, n].
        mix: λ.
    """
    return weight.double() @ torch.lerp(gram.double(), cross.double(), mix)


def alternating_update(weight: Tensor, gram: Tensor, target: Tensor, rank: int, ridge: float) -> Factors:
    """Reconstruct by the paper's M: from the whitened SVD, solve for U, then for V (MPIFA, section 4).

    U ← E[y xᵀ] Vᵀ (V G Vᵀ)⁻¹, then V ← U⁺ W_ls with W_ls = (E[y xᵀ] + αW)(G + αI)⁻¹. Unlike the reference
    implementation both solves are float64 and α is relative to the scale of G.

    Args:
        weight: W [m, n].
        gram: G [n, n].
        target: E[y xᵀ] [m, n], see `target_cross`.
        rank: r, at most min(m, n).
        ridge: α in units of G's mean diagonal.
    """
    metric = regularised(gram.double(), ridge)
    _, v = _project(weight.double(), metric, rank)
    u = solve_spd(v @ metric @ v.T, v @ (target.double() + _alpha(gram, ridge) * weight.double()).T).T
    least_squares = _least_squares(weight, gram, target, ridge)
    return u, solve_spd(u.T @ u, u.T @ least_squares)


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Return (E‖(W - W')x‖² / E‖W x‖²)^½ on the inputs that G describes."""
    w, gram = weight.double(), gram.double()
    difference = w - approximation.double()
    error = float(((difference @ gram) * difference).sum())
    scale = float(((w @ gram) * w).sum())
    return (max(error, 0.0) / scale) ** 0.5 if scale > 0.0 else 0.0


def _alpha(gram: Tensor, ridge: float) -> float:
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    mean = float(diagonal.double().mean())
    # A layer whose inputs are all zero says nothing; any positive metric serves it.
    return ridge * mean if mean > 0.0 else 1.0


def regularised(gram: Tensor, ridge: float) -> Tensor:
    """Return G + αI in the dtype of G, α in units of G's mean diagonal."""
    result = gram.clone()
    result.diagonal().add_(_alpha(gram, ridge))
    return result


def _least_squares(weight: Tensor, gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    right = target.double() + _alpha(gram, ridge) * weight.double()
    return solve_spd(regularised(gram.double(), ridge), right.T).T


def _project(weight: Tensor, metric: Tensor, rank: int) -> Factors:
    """P_r(W L) L⁻¹ for metric = L Lᵀ, by an eigendecomposition on the smaller side."""
    m, n = weight.shape
    if m <= n:
        # P_r(W L) = Q Qᵀ W L with Q the leading eigenvectors of W L Lᵀ Wᵀ: L itself is never needed.
        gram = weight @ metric @ weight.T
        q = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, m - rank :]  # [m, r]
        return q, q.T @ weight
    root, solve = _square_root(metric)
    left = weight @ root  # [m, n]
    z = torch.linalg.eigh(left.T @ left).eigenvectors[:, n - rank :]  # [n, r]
    return left @ z, solve(z).T


def _square_root(metric: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """L with L Lᵀ = metric, and b ↦ L⁻ᵀ b."""
    root, info = torch.linalg.cholesky_ex(metric)
    if int(info) == 0:
        return root, lambda b: torch.linalg.solve_triangular(root.T, b, upper=True)
    values, vectors = _clipped_eigh(metric)
    scale = values.sqrt()
    return vectors * scale, lambda b: (vectors / scale) @ b


def solve_spd(metric: Tensor, right: Tensor) -> Tensor:
    """Return metric⁻¹ right, through an eigendecomposition where rounding has made the metric indefinite."""
    root, info = torch.linalg.cholesky_ex(metric)
    if int(info) == 0:
        return torch.cholesky_solve(right, root)
    values, vectors = _clipped_eigh(metric)
    return vectors @ ((vectors.T @ right) / values[:, None])


def _clipped_eigh(metric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    floor = float(values[-1]) * metric.shape[0] * torch.finfo(metric.dtype).eps
    return values.clamp(min=max(floor, torch.finfo(metric.dtype).tiny)), vectors
