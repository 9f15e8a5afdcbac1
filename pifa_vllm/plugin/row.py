"""A row-parallel layer in pivoting form: rank i of t gets its share of the input features.

Each rank multiplies its x by its columns of all pivot rows, which gives a summand of y_p [tokens, r]. The ranks
reduce-scatter it, so that each has ⌈r/t⌉ finished pivot outputs, and hold the columns of C that belong to them.
What a rank returns is a summand of y, as a dense row-parallel layer's is, and vLLM sums it: LoRA, which adds its
own summand before, stays right. A rank holds and multiplies 1/t of the layer, and r numbers per token are reduced
beside the m that a dense layer reduces, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pifa_vllm.factorization import remaining_rows
from pifa_vllm.ops import Matrix, dense
from pifa_vllm.plugin.layout import Parameters, Shard, is_coefficients

ReduceScatter = Callable[[Tensor], Tensor]


class RowLayout:
    """One rank's share. `rows` are the columns of [own y_p | outputs of coefficients | 0] that y takes.

    Args:
        shard: the layer's only module.
        inputs: the columns [begin, end) of the matrix that this rank has the inputs of.
        tp_rank: i.
        tp_size: t.
        reduce_scatter: of [..., t·share], returns the i-th [..., share] of the sum over the ranks.
    """

    def __init__(
        self,
        shard: Shard,
        inputs: tuple[int, int],
        tp_rank: int,
        tp_size: int,
        reduce_scatter: ReduceScatter,
    ) -> None:
        self.shards = [shard]
        self._inputs = inputs
        self._reduce_scatter = reduce_scatter
        unit = shard.unit("coefficients")
        share = -(-shard.pivots // (tp_size * unit)) * unit
        self._padding = share * tp_size - shard.pivots
        self._begin = min(tp_rank * share, shard.pivots)
        self._end = min(self._begin + share, shard.pivots)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[r, own inputs]; (m - r) · own pivots; m; and of scales."""
        (shard,) = self.shards
        rest = shard.m - shard.pivots
        shapes: dict[str, tuple[int, ...]] = {"rows": (shard.m,)}
        for name in ("pivot_weight", "pivot_scale")[: 2 if shard.kind else 1]:
            shapes[name] = (shard.pivots, self._width(name))
        for name in ("coefficients", "coefficient_scale")[: 2 if shard.kind else 1]:
            shapes[name] = (rest * self._width(name),)
        return shapes

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View all of a parameter."""
        (shard,), whole = self.shards, parameters.of(suffix)
        if is_coefficients(suffix):
            return whole.view(shard.m - shard.pivots, self._width(suffix))
        return whole

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Cut this rank's columns out of the checkpoint's tensor."""
        return tensor[:, self._columns(suffix)]

    def _columns(self, suffix: str) -> slice:
        return self.shards[0].columns(
            suffix, *((self._begin, self._end) if is_coefficients(suffix) else self._inputs)
        )

    def _width(self, suffix: str) -> int:
        columns = self._columns(suffix)
        return columns.stop - columns.start  # type: ignore[no-any-return]  # a slice's are Any

    def rows(self, pivot_rows: Sequence[Tensor]) -> Tensor:
        """int32 [m]."""
        (shard,), (pivots,) = self.shards, pivot_rows
        own = self._end - self._begin
        rest = remaining_rows(pivots, shard.m)
        # What other ranks' pivot rows give is zero here.
        columns = torch.full((shard.m,), own + len(rest), dtype=torch.int32, device=pivots.device)
        columns[pivots[self._begin : self._end].long()] = torch.arange(
            own, dtype=torch.int32, device=pivots.device
        )
        columns[rest.long()] = torch.arange(own, own + len(rest), dtype=torch.int32, device=pivots.device)
        return columns

    def apply(self, parameters: Parameters, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., own inputs] to a summand of y [..., m]; the bias is one rank's."""
        size = parameters.group_size
        y_p = dense(x, Matrix(parameters.pivot_weight, parameters.pivot_scale, size))  # [..., r]
        own = self._reduce_scatter(pad(y_p, (0, self._padding)))[..., : self._end - self._begin]
        scale = None
        if parameters.coefficient_scale is not None:
            scale = self.part(0, "coefficient_scale", parameters)
        rest = dense(own, Matrix(self.part(0, "coefficients", parameters), scale, size))
        y = torch.cat([own, rest, own.new_zeros((*own.shape[:-1], 1))], dim=-1)
        y = y.index_select(-1, parameters.rows)
        return y if bias is None else y + bias
