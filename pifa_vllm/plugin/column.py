"""A column-parallel layer in pivoting form: rank i of t computes its share of every shard's output rows.

The pivot rows of the compressed shards form one stack [R, n]. Every rank multiplies ⌈R/t⌉ of them, whoever's
outputs they are, and the ranks gather y_p [tokens, R]. From it each computes the remaining rows among its outputs:
their coefficients are consecutive rows of C, as many as the data leaves between its pivot rows. So a rank holds
and multiplies 1/t of the layer, up to that unevenness, and R numbers per token are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pifa_vllm.errors import CheckpointError
from pifa_vllm.ops import Matrix, dense
from pifa_vllm.plugin.layout import Parameters, Shard, is_coefficients

Gather = Callable[[Tensor], Tensor]


class ColumnLayout:
    """One rank's share. `rows` are the columns of [y_p | dense outputs | outputs of coefficients] that it returns.

    Args:
        shards: of the layer.
        outputs: the rows [begin, end) of each shard that this rank computes.
        pivot_rows: int [r] of each compressed shard, None for a dense one: they decide how many coefficients
            there are on this rank.
        tp_rank: i.
        tp_size: t.
        gather: concatenates the [..., any] of all ranks along the last dimension.
    """

    def __init__(
        self,
        shards: list[Shard],
        outputs: Sequence[tuple[int, int]],
        pivot_rows: Sequence[Tensor | None],
        tp_rank: int,
        tp_size: int,
        gather: Gather,
    ) -> None:
        self.shards = shards
        self._outputs = outputs
        self._gather = gather
        # Of each shard: the rows of C among its outputs, and where its pivot rows begin in the stack.
        self._rest: list[tuple[int, int]] = []
        self._pivot: list[int] = []
        stack = 0
        for shard, edges, rows in zip(shards, outputs, pivot_rows, strict=True):
            self._pivot.append(stack)
            self._rest.append((0, 0) if rows is None else _rest(edges, rows))
            stack += shard.rank or 0
        self._stack = stack  # R
        self._share = -(-stack // tp_size)
        self._first = min(tp_rank * self._share, stack)
        self._own = min(self._share, stack - self._first)
        self._dense = [
            end - begin if shard.rank is None else 0
            for shard, (begin, end) in zip(shards, outputs, strict=True)
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[own pivot rows + rows of dense shards, n]; numbers of its coefficients; its outputs; and of scales."""
        first, rows = self.shards[0], self._own + sum(self._dense)
        shapes: dict[str, tuple[int, ...]] = {"rows": (sum(end - begin for begin, end in self._outputs),)}
        for name in ("pivot_weight", "pivot_scale")[: 2 if first.kind else 1]:
            shapes[name] = (rows, first.shape(name)[1])
        for name in ("coefficients", "coefficient_scale")[: 2 if first.kind else 1]:
            shapes[name] = (sum(math.prod(shape) for shape in self._coefficients(name)),)
        return shapes

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View this rank's pivot rows of a shard, its coefficients, or its rows of a dense one."""
        whole = parameters.of(suffix)
        if is_coefficients(suffix):
            return self._matrices(whole, suffix)[index]
        if suffix in ("weight", "weight_scale"):
            return torch.split(whole[self._own :], self._dense)[index]
        begin, end = self._own_pivots(index)
        offset = self._pivot[index] - self._first
        return whole[begin + offset : end + offset]

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Cut the same out of the checkpoint's tensor."""
        if is_coefficients(suffix):
            begin, end = self._rest[index]
        elif suffix in ("weight", "weight_scale"):
            begin, end = self._outputs[index]
        else:
            begin, end = self._own_pivots(index)
        return tensor[begin:end]

    def rows(self, pivot_rows: Sequence[Tensor]) -> Tensor:
        """int32 [outputs].

        Raises:
            CheckpointError: if the pivot rows leave this rank another number of coefficients than it has room for.
        """
        columns = []
        rest = self._stack + sum(self._dense)
        for index, (shard, edges, pivots) in enumerate(
            zip(self.shards, self._outputs, pivot_rows, strict=True)
        ):
            wanted = torch.arange(*edges, device=pivots.device)
            if shard.rank is None:
                columns.append(wanted - edges[0] + self._stack + sum(self._dense[:index]))
                continue
            rest_of_these = _rest(edges, pivots)
            if rest_of_these != self._rest[index]:
                raise CheckpointError(
                    f"layer {shard.name}: expected pivot rows that leave rows {self._rest[index]} of the "
                    f"coefficients to this tensor-parallel rank, as those that the engine was started with "
                    f"did; found {rest_of_these}. Start another engine for this checkpoint."
                )
            before = torch.searchsorted(pivots.long(), wanted)  # pivot rows above each wanted row
            is_pivot = torch.isin(wanted, pivots.long())
            remaining = wanted - before - self._rest[index][0] + rest
            columns.append(torch.where(is_pivot, before + self._pivot[index], remaining))
            rest += self._rest[index][1] - self._rest[index][0]
        return torch.cat(columns).to(torch.int32)

    def apply(self, parameters: Parameters, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., n], the same on all ranks, to this rank's outputs."""
        return self.finish(parameters, *self.start(parameters, x), bias)

    def start(self, parameters: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y_p [..., R], gathered, and this rank's outputs of dense shards."""
        y = dense(x, Matrix(parameters.pivot_weight, parameters.pivot_scale, parameters.group_size))
        own, kept = torch.split(y, [self._own, sum(self._dense)], dim=-1)
        if self._stack == 0:
            return own, kept
        # The last ranks may have fewer than their share; what is gathered must be of equal sizes.
        y_p = self._gather(pad(own, (0, self._share - self._own)))
        return y_p[..., : self._stack], kept

    def finish(self, parameters: Parameters, y_p: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        """Return this rank's outputs."""
        columns, size = [y_p, kept], parameters.group_size
        matrices = self._matrices(parameters.coefficients, "coefficients")
        scales: Sequence[Tensor | None] = [None] * len(matrices)
        if parameters.coefficient_scale is not None:
            scales = self._matrices(parameters.coefficient_scale, "coefficient_scale")
        for shard, first, matrix, scale in zip(self.shards, self._pivot, matrices, scales, strict=True):
            if matrix.shape[0] > 0:
                own = y_p[..., first : first + (shard.rank or 0)]
                columns.append(dense(own, Matrix(matrix, scale, size)))
        y = torch.cat(columns, dim=-1).index_select(-1, parameters.rows)
        return y if bias is None else y + bias

    def _own_pivots(self, index: int) -> tuple[int, int]:
        """Which of a shard's pivot rows this rank multiplies."""
        rank, first = self.shards[index].rank or 0, self._first - self._pivot[index]
        begin, end = (min(max(edge, 0), rank) for edge in (first, first + self._own))
        return begin, end

    def _coefficients(self, suffix: str) -> list[tuple[int, int]]:
        """Of each shard the shape of its coefficients, or of their scales, on this rank."""
        return [
            (end - begin, s.columns(suffix, 0, s.rank or 0).stop)
            for s, (begin, end) in zip(self.shards, self._rest, strict=True)
        ]

    def _matrices(self, flat: Tensor, suffix: str) -> list[Tensor]:
        """Of each shard [rows of C on this rank, r], as it is stored."""
        shapes = self._coefficients(suffix)
        parts = torch.split(flat, [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _rest(edges: tuple[int, int], pivot_rows: Tensor) -> tuple[int, int]:
    """The rows [begin, end) of C that make the outputs [begin, end) which are no pivot rows."""
    begin, end = (edge - int((pivot_rows < edge).sum()) for edge in edges)
    return begin, end
