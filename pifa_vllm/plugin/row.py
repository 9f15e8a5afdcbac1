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
from pifa_vllm.plugin.layout import Parameters, Shard, dense

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
        share = -(-shard.pivots // tp_size)
        self._padding = share * tp_size - shard.pivots
        self._begin = min(tp_rank * share, shard.pivots)
        self._end = min(self._begin + share, shard.pivots)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[r, own inputs]; (m - r) · own pivots; m."""
        (shard,) = self.shards
        rest, _ = shard.shape("coefficients")
        return {
            "pivot_weight": (shard.pivots, self._inputs[1] - self._inputs[0]),
            "coefficients": (rest * (self._end - self._begin),),
            "rows": (shard.m,),
        }

    def part(self, index: int, suffix: str, parameters: Parameters) -> Tensor:
        """View all of a parameter."""
        if suffix == "coefficients":
            (shard,) = self.shards
            return parameters.coefficients.view(shard.m - shard.pivots, self._end - self._begin)
        return parameters.pivot_weight

    def cut(self, index: int, suffix: str, tensor: Tensor) -> Tensor:
        """Cut this rank's columns out of the checkpoint's tensor."""
        begin, end = (self._begin, self._end) if suffix == "coefficients" else self._inputs
        return tensor[:, begin:end]

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
        y_p = dense(x, parameters.pivot_weight)  # [..., r]
        own = self._reduce_scatter(pad(y_p, (0, self._padding)))[..., : self._end - self._begin]
        rest = dense(own, self.part(0, "coefficients", parameters))
        y = torch.cat([own, rest, own.new_zeros((*own.shape[:-1], 1))], dim=-1)
        y = y.index_select(-1, parameters.rows)
        return y if bias is None else y + bias
