"""What one rank holds of a layer in pivoting form when it holds all of it, and what every layout answers to.

The layouts for several tensor-parallel ranks are `pifa_vllm.plugin.column` and `pifa_vllm.plugin.row`, that for
pivot columns is `pifa_vllm.plugin.pivot_columns`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from pifa_vllm.checkpoint import FactorFormat
from pifa_vllm.checkpoint.schema import PIVOT_COLUMNS, PIVOT_ROWS, factor_shapes
from pifa_vllm.ops import pifa_linear, stacked_rows
from pifa_vllm.quantization import groups, row_width, unit

# The tensor of scales that lies beside one of numbers.
SCALE_OF = {"pivot_weight": "pivot_scale", "coefficients": "coefficient_scale", "weight": "weight_scale"}


def is_coefficients(suffix: str) -> bool:
    """Tell whether a tensor is of the coefficients: the others of a module are of its pivots, or of all of it."""
    return suffix in ("coefficients", "coefficient_scale")


@dataclass
class Shard:
    """One module of the checkpoint inside a vLLM layer, of full shape [m, n].

    Attributes:
        rank: None if it is dense beside compressed ones: all of its rows are pivot rows then.
        m: set when vLLM tells the layer's shape.
        n: likewise.
        kind: how its numbers are quantized, if they are; the same of all shards of a layer.
        loaded: suffixes of the tensors that were loaded.
    """

    name: str
    rank: int | None
    m: int = 0
    n: int = 0
    kind: FactorFormat | None = None
    loaded: set[str] = field(default_factory=set)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The tensors, besides a bias, that the checkpoint holds for it."""
        numbers = ("weight",) if self.rank is None else ("pivot_weight", "coefficients")
        scales = () if self.kind is None else tuple(map(SCALE_OF.__getitem__, numbers))
        return (*numbers, *scales, *(() if self.rank is None else (self.pivots_name,)))

    @property
    def pivots_name(self) -> str:
        """What says which its pivots are: "pivot_rows" or "pivot_columns"."""
        return PIVOT_ROWS if self.kind is None else self.kind.pivots(self.name)

    def source(self, suffix: str) -> str:
        """Name one of its tensors in an error."""
        return f"layer {self.name}: tensor {self.name}.{suffix}"

    @property
    def size(self) -> int:
        """Rows, or columns, among which its pivots are."""
        return self.n if self.pivots_name == PIVOT_COLUMNS else self.m

    @property
    def pivots(self) -> int:
        """Number of pivots."""
        return self.m if self.rank is None else self.rank

    def shape(self, suffix: str) -> list[int]:
        """Shape of one of its matrices in the checkpoint."""
        # A dense one is all pivot rows, whatever the others have.
        pivots = PIVOT_ROWS if self.rank is None else self.pivots_name
        weight, coefficients = factor_shapes(pivots, self.m, self.n, self.pivots)
        rows, k = coefficients if is_coefficients(suffix) else weight
        return [rows, self.columns(suffix, 0, k).stop]

    def dtype(self, suffix: str, served: torch.dtype) -> torch.dtype:
        """Of one of its tensors where the model is served in `served`."""
        if suffix in (PIVOT_ROWS, PIVOT_COLUMNS):
            return torch.int32
        if self.kind is None:
            return served
        if suffix.endswith("_scale"):
            return torch.float16
        return self.kind.coefficient_dtype if suffix == "coefficients" else self.kind.dtype

    def unit(self, suffix: str) -> int:
        """Columns of a matrix that only one tensor-parallel rank can have, see `quantization.unit`."""
        return 1 if self.kind is None else unit(self.dtype(suffix, torch.float32), self.kind.group)

    def columns(self, suffix: str, begin: int, end: int) -> slice:
        """Where a tensor has the columns [begin, end) of its matrix; `begin` is a multiple of its unit."""
        if self.kind is None:
            return slice(begin, end)
        if suffix.endswith("_scale"):
            size = self.kind.group
            return slice(begin // size, groups(end, size)) if size else slice(0, min(end, 1))
        stored = self.dtype(suffix, torch.float32)
        return slice(row_width(begin, stored), row_width(end, stored))


class Parameters(NamedTuple):
    """What a rank holds of a layer, besides the pivots of its shards.

    Attributes:
        pivot_weight: matrix; the rows that x is multiplied with first. With pivot columns flat, as the next one is.
        coefficients: flat; the matrices that y_p is multiplied with, one after another.
        rows: int32 [outputs of this rank], where they come from or go to; derived from the pivots. With pivot
            columns [inputs of all shards], in which order they are taken.
        pivot_scale: of the pivot weight, where it is quantized.
        coefficient_scale: flat, of the coefficients.
        group_size: of the groups that share a scale.
    """

    pivot_weight: Tensor
    coefficients: Tensor
    rows: Tensor
    pivot_scale: Tensor | None = None
    coefficient_scale: Tensor | None = None
    group_size: int = 0

    def of(self, suffix: str) -> Tensor:
        """Return the one that a shard's tensor is part of: the rows of dense shards are pivot rows here."""
        found = getattr(self, {"weight": "pivot_weight", "weight_scale": "pivot_scale"}.get(suffix, suffix))
        return cast("Tensor", found)


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

    def rows(self, pivots: Sequence[Tensor]) -> Tensor:
        """Build `rows` from the pivots [r] of each shard; a dense one's are all of its rows, or columns."""
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
        """[Σr, n], Σ (m - r) r, Σm, and of scales."""
        pivots, rest = sum(self._ranks), [SCALE_OF["pivot_weight"], SCALE_OF["coefficients"]]
        names = ["pivot_weight", "coefficients", *(rest if self.shards[0].kind else [])]
        flat = {name: (sum(math.prod(shard.shape(name)) for shard in self.shards),) for name in names[1::2]}
        wide = {name: (pivots, self.shards[0].shape(name)[1]) for name in names[::2]}
        return {**wide, **flat, "rows": (sum(self._out_features),)}

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View a shard's whole tensor."""
        whole = parameters.of(suffix)
        if is_coefficients(suffix):
            shapes = [shard.shape(suffix) for shard in self.shards]
            return torch.split(whole, [math.prod(shape) for shape in shapes])[index].view(shapes[index])
        return torch.split(whole, self._ranks)[index]

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Keep all of it."""
        return tensor

    def rows(self, pivots: Sequence[Tensor]) -> Tensor:
        """Σm."""
        return stacked_rows(pivots, self._out_features)

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
            *parameters[3:],
        )
