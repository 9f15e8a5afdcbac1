"""What one rank holds of a layer in pivoting form when it holds all of it, and what every layout answers to.

The layouts for several tensor-parallel ranks are `pifa_vllm.plugin.column` and `pifa_vllm.plugin.row`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pifa_vllm.ops import pifa_linear, stacked_rows


@dataclass
class Shard:
    """One module of the checkpoint inside a vLLM layer, of full shape [m, n].

    Attributes:
        rank: None if it is dense beside compressed ones: all of its rows are pivot rows then.
        m: set when vLLM tells the layer's shape.
        n: likewise.
        loaded: suffixes of the tensors that were loaded.
    """

    name: str
    rank: int | None
    m: int = 0
    n: int = 0
    loaded: set[str] = field(default_factory=set)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The tensors, besides a bias, that the checkpoint holds for it."""
        return ("weight",) if self.rank is None else ("pivot_weight", "coefficients", "pivot_rows")

    def source(self, suffix: str) -> str:
        """Name one of its tensors in an error."""
        return f"layer {self.name}: tensor {self.name}.{suffix}"

    @property
    def pivots(self) -> int:
        """Number of pivot rows."""
        return self.m if self.rank is None else self.rank

    def shape(self, suffix: str) -> list[int]:
        """Shape of one of its tensors in the checkpoint."""
        if suffix == "pivot_rows":
            return [self.pivots]
        return [self.m - self.pivots, self.pivots] if suffix == "coefficients" else [self.pivots, self.n]


class Parameters(NamedTuple):
    """What a rank holds of a layer, besides the pivot rows of its shards.

    Attributes:
        pivot_weight: matrix; the rows that x is multiplied with first.
        coefficients: flat; the matrices that y_p is multiplied with, one after another.
        rows: int32 [outputs of this rank], where they come from or go to; derived from the pivot rows.
    """

    pivot_weight: Tensor
    coefficients: Tensor
    rows: Tensor


class Layout(Protocol):
    """How one rank holds a layer."""

    shards: list[Shard]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `Parameters`, by name."""
        ...

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View what this rank holds of a shard's tensor inside the parameters."""
        ...

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Cut the same out of the checkpoint's tensor."""
        ...

    def rows(self, pivot_rows: Sequence[Tensor]) -> Tensor:
        """Build `rows` from the pivot rows [r] of each shard; a dense one's are all of its rows."""
        ...

    def apply(self, parameters: Parameters, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply this rank's x [..., n] to its y."""
        ...


class WholeLayout:
    """All of it, on one rank: `rows` is the output column of each stacked row (`ops.stacked_rows`)."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self._ranks = [shard.pivots for shard in shards]
        self._out_features = [shard.m for shard in shards]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[Σr, n], Σ (m - r) r, Σm."""
        coefficients = sum(math.prod(shard.shape("coefficients")) for shard in self.shards)
        return {
            "pivot_weight": (sum(self._ranks), self.shards[0].n),
            "coefficients": (coefficients,),
            "rows": (sum(self._out_features),),
        }

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View a shard's whole tensor."""
        if suffix == "coefficients":
            shapes = [shard.shape(suffix) for shard in self.shards]
            split = torch.split(parameters.coefficients, [math.prod(shape) for shape in shapes])
            return split[index].view(shapes[index])
        return torch.split(parameters.pivot_weight, self._ranks)[index]

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Keep all of it."""
        return tensor

    def rows(self, pivot_rows: Sequence[Tensor]) -> Tensor:
        """Σm."""
        return stacked_rows(pivot_rows, self._out_features)

    def apply(self, parameters: Parameters, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., n] to [..., Σm]."""
        return pifa_linear(
            x,
            parameters.pivot_weight,
            parameters.coefficients,
            parameters.rows,
            self._ranks,
            self._out_features,
            bias,
        )


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., n] by a dense matrix [m, n]: to the kernels one that is all pivot rows, in order."""
    m = weight.shape[0]
    if m == 0 or weight.shape[1] == 0:
        y = x.new_zeros((*x.shape[:-1], m))
        return y if bias is None else y + bias
    return pifa_linear(x, weight, weight.new_empty(0), None, [m], [m], bias)
