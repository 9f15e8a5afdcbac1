"""What is added to a weight before its rank is cut, or it is rounded: the correction that later tokens confirm.

M aims a module at a target y instead of its own output W x. The least-squares answer is W + Δ with

    Δ = R (G + αI)⁻¹,    R = E[(y - W x) xᵀ] = λ W (H - G) + μ D

(G, H, D as in `pifa_vllm.compression.lowrank`), and the best rank-r answer is P_r((W + Δ) L) L⁻¹, reduced-rank
regression. But Δ has as many free numbers as W, and the calibration tokens are few: most of a plain Δ is fitted
to their noise, and since every later layer fits the noise again, the error on other text grows while it shrinks
on theirs. So Δ is cross-fitted: fitted to each half of the samples and judged on the other half, which gives
both its ridge α and the factor s it deserves. The full target (λ = 1, the dense model's own output) then needs
no hedging by a mix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pifa_vllm.compression.lowrank import regularised, solve_spd
from pifa_vllm.compression.moments import Moments

# α in units of G's mean diagonal. On SmolLM2-135M the inputs of q, k, v, gate and up take the first, those of o and
# down the other two.
RIDGES = (1e-3, 3e-2, 1.0)


class Correction(NamedTuple):
    """Δ and how it was found.

    Attributes:
        delta: sΔ [m, n], float64.
        ridge: α in units of G's mean diagonal.
        shrinkage: s in [0, 1]; 0 where neither half's fit helps on the other.
    """

    delta: Tensor
    ridge: float
    shrinkage: float


def fit_correction(weight: Tensor, moments: Moments, mix: float, feedback: float) -> Correction:
    """Fit Δ for one module.

    Args:
        weight: W [m, n].
        moments: of the module's inputs, in two folds of the samples.
        mix: λ.
        feedback: μ; o and down write to the residual stream, so their targets also ask them to undo the error
            h_o - h that the stream carries by then, as far as their inputs predict it.
    """
    w = weight.float()
    halves = [_residual(w, moments, mix, feedback, fold) for fold in (0, 1)]
    best_gain, best_ridge, shrinkage = 0.0, RIDGES[-1], 0.0
    for ridge in RIDGES:
        # Over both directions: what the fit explains of the other half's residual, and its own energy there.
        explained = energy = 0.0
        for (gram, residual), (other_gram, other_residual) in (halves, halves[::-1]):
            delta = solve_spd(regularised(gram, ridge), residual.T).T
            explained += float((delta * other_residual).sum())
            energy += float(((delta @ other_gram) * delta).sum())
        factor = min(max(explained / energy, 0.0), 1.0) if energy > 0.0 else 0.0
        # By how much E‖y - (W + sΔ) x‖² falls below E‖y - W x‖² on the half that Δ was not fitted to.
        gain = 2.0 * factor * explained - factor * factor * energy
        if gain > best_gain:
            best_gain, best_ridge, shrinkage = gain, ridge, factor
    if shrinkage == 0.0:
        return Correction(torch.zeros_like(weight, dtype=torch.float64), best_ridge, 0.0)
    gram, residual = _residual(weight.double(), moments, mix, feedback)
    # Twice the tokens of a half: the ridge that stands for their noise is half as large.
    delta = solve_spd(regularised(gram, best_ridge / 2), residual.T).T
    return Correction(shrinkage * delta, best_ridge, shrinkage)


def _residual(
    weight: Tensor, moments: Moments, mix: float, feedback: float, fold: int | None = None
) -> tuple[Tensor, Tensor]:
    """G [n, n] and R [m, n] of one fold, or of all samples, in the dtype of the weight."""
    gram = moments.gram(fold)
    residual = mix * (weight @ (moments.cross(fold) - gram).to(weight.dtype))
    drift = moments.drift(fold)
    if drift is not None and feedback > 0.0:
        residual += feedback * drift.to(weight.dtype)
    return gram.to(weight.dtype), residual
