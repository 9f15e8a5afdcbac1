"""Second moments of a module group's inputs over the calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# Wide enough for full-speed GEMMs, narrow enough that skipping the upper triangle saves a third of the work.
_BLOCK = 384


class Moments:
    """Running G = E[x xᵀ], H = E[x_o xᵀ] and D = E[(h_o - h) xᵀ], float32 sums over tokens.

    x are the compressed model's inputs, x_o the dense model's; h and h_o the residual streams that the module's
    output is added to. q, k, v share one instance, and so do gate and up.

    Args:
        features: n, the width of the inputs.
        stream: width of the residual stream for modules that write to it (o and down), None for the others.
        dense_gram: accumulate G_o = E[x_o x_oᵀ] in place of G and H (for methods that look at the dense model
            alone).
    """

    def __init__(
        self, features: int, device: torch.device, *, stream: int | None = None, dense_gram: bool = False
    ) -> None:
        self.tokens = 0
        self.dense_gram = dense_gram
        self._gram = torch.zeros(features, features, device=device)
        self._cross = None if dense_gram else torch.zeros(features, features, device=device)
        self._drift = None if stream is None else torch.zeros(stream, features, device=device)

    def add(self, dense: Tensor, compressed: Tensor, drift: Tensor | None = None) -> None:
        """Accumulate one batch of the same tokens: inputs [..., n] each, and h_o - h [..., stream]."""
        x_o = dense.reshape(-1, dense.shape[-1]).float()
        x = x_o if self.dense_gram else compressed.reshape(-1, compressed.shape[-1]).float()
        self.tokens += x.shape[0]
        n = x.shape[1]
        for start in range(0, n, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n))
            # The lower triangle of blocks is enough for a symmetric matrix.
            self._gram[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop])
        if self._cross is not None:
            self._cross.addmm_(x_o.T, x)
        if self._drift is not None and drift is not None:
            self._drift.addmm_(drift.reshape(-1, drift.shape[-1]).float().T, x)

    def gram(self) -> Tensor:
        """Return G (or G_o) [n, n], float64."""
        lower = self._gram.tril().double() / max(self.tokens, 1)
        return lower + lower.tril(-1).T

    def cross(self) -> Tensor:
        """Return H [n, n], float64; G_o where only that was accumulated."""
        if self._cross is None:
            return self.gram()
        return self._cross.double() / max(self.tokens, 1)

    def drift(self) -> Tensor | None:
        """Return D [stream, n], float64; None for modules that do not write to the residual stream."""
        return None if self._drift is None else self._drift.double() / max(self.tokens, 1)
