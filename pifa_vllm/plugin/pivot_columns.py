"""A layer whose modules have pivot columns: y = W_c (x_p + B x_r), see `pifa_vllm.ops.pivot_columns_linear`.

Under tensor parallelism every rank has all of B, a small part of such a module, and its share of the rows of W_c.
All have the same x, so nothing is gathered, as in a dense column-parallel layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pifa_vllm.ops import Matrix, column_order, dense, pivot_columns_linear
from pifa_vllm.plugin.layout import SCALE_OF, Parameters, Shard, is_coefficients


class PivotColumnsLayout:
    """One rank's share. `rows` are the orders in which the shards take the inputs, one after another.

    Args:
        shards: of the layer.
        outputs: the rows [begin, end) of each shard that this rank computes.
    """

    def __init__(self, shards: list[Shard], outputs: Sequence[tuple[int, int]]) -> None:
        self.shards = shards
        self._outputs = outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Numbers of all shards' matrices, and of their scales; inputs of all shards."""
        names = ["pivot_weight", "coefficients", *map(SCALE_OF.__getitem__, ("pivot_weight", "coefficients"))]
        flat = {name: (sum(map(math.prod, self._shapes(name))),) for name in names}
        return {**flat, "rows": (sum(shard.n for shard in self.shards),)}

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View this rank's rows of one of a shard's matrices, or all of its coefficients."""
        shapes = self._shapes(suffix)
        parts = torch.split(parameters.of(suffix), [math.prod(shape) for shape in shapes])
        return parts[index].view(shapes[index])

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Cut the same out of the checkpoint's tensor."""
        return tensor if is_coefficients(suffix) else tensor[slice(*self._outputs[index])]

    def rows(self, pivots: Sequence[Tensor]) -> Tensor:
        """int32 [inputs of all shards]."""
        return torch.cat([column_order(p, s.n) for p, s in zip(pivots, self.shards, strict=True)])

    def apply(self, parameters: Parameters, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., n], the same on all ranks, to this rank's outputs."""
        orders = torch.split(parameters.rows, [shard.n for shard in self.shards])
        columns = []
        for index, (shard, order) in enumerate(zip(self.shards, orders, strict=True)):
            pivots = self._matrix(index, "pivot_weight", parameters)
            if shard.rank is None:
                columns.append(dense(x, pivots))
            else:
                rest = self._matrix(index, "coefficients", parameters)
                columns.append(pivot_columns_linear(x, pivots, rest, order))
        y = torch.cat(columns, dim=-1)
        return y if bias is None else y + bias

    def _matrix(self, index: int, name: str, parameters: Parameters) -> Matrix:
        numbers, scale = (self.part(index, x, parameters) for x in (name, SCALE_OF[name]))
        return Matrix(numbers, scale, parameters.group_size)

    def _shapes(self, suffix: str) -> list[tuple[int, int]]:
        """Of each shard's tensor on this rank."""
        shapes = []
        for shard, (begin, end) in zip(self.shards, self._outputs, strict=True):
            rows, width = shard.shape(suffix)
            shapes.append((rows if is_coefficients(suffix) else end - begin, width))
        return shapes
