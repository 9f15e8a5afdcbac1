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
        folds: into how many parts, of whole batches, the tokens are divided.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        *,
        stream: int | None = None,
        dense_gram: bool = False,
        folds: int = 1,
    ) -> None:
        self.dense_gram = dense_gram
        self._sums = [_Sums(features, device, stream, dense_gram) for _ in range(folds)]
        self._batches = 0

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return sum(sums.tokens for sums in self._sums)

    def add(self, dense: Tensor, compressed: Tensor, drift: Tensor | None = None) -> None:
        """Accumulate one batch of the same tokens: inputs [..., n] each, and h_o - h [..., stream]."""
        x_o = dense.reshape(-1, dense.shape[-1]).float()
        x = x_o if self.dense_gram else compressed.reshape(-1, compressed.shape[-1]).float()
        lost = None if drift is None else drift.reshape(-1, drift.shape[-1]).float()
        self._sums[self._batches % len(self._sums)].add(x_o, x, lost)
        self._batches += 1

    def gram(self, fold: int | None = None) -> Tensor:
        """Return G (or G_o) [n, n], float64, of one fold or of all tokens."""
        lower = self._mean([sums.gram for sums in self._of(fold)], fold).tril()
        return lower + lower.tril(-1).T

    def cross(self, fold: int | None = None) -> Tensor:
        """Return H [n, n], float64; G_o where only that was accumulated."""
        found = [sums.cross for sums in self._of(fold) if sums.cross is not None]
        return self._mean(found, fold) if found else self.gram(fold)

    def drift(self, fold: int | None = None) -> Tensor | None:
        """Return D [stream, n], float64; None for modules that do not write to the residual stream."""
        found = [sums.drift for sums in self._of(fold) if sums.drift is not None]
        return self._mean(found, fold) if found else None

    def _of(self, fold: int | None) -> list[_Sums]:
        return self._sums if fold is None else [self._sums[fold]]

    def _mean(self, sums: list[Tensor], fold: int | None) -> Tensor:
        total = sums[0].double()
        for more in sums[1:]:
            total += more
        return total / max(sum(x.tokens for x in self._of(fold)), 1)


class _Sums:
    """The sums of one fold."""

    def __init__(self, features: int, device: torch.device, stream: int | None, dense_gram: bool) -> None:
        self.tokens = 0
        self.gram = torch.zeros(features, features, device=device)
        self.cross = None if dense_gram else torch.zeros(features, features, device=device)
        self.drift = None if stream is None else torch.zeros(stream, features, device=device)

    def add(self, x_o: Tensor, x: Tensor, drift: Tensor | None) -> None:
        self.tokens += x.shape[0]
        n = x.shape[1]
        for start in range(0, n, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n))
            # The lower triangle of blocks is enough for a symmetric matrix.
            self.gram[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop])
        if self.cross is not None:
            self.cross.addmm_(x_o.T, x)
        if self.drift is not None and drift is not None:
            self.drift.addmm_(drift.T, x)
