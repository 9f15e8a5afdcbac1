"""The linear layer of a PIFA checkpoint in vLLM: its parameters, their loading, its forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from pifa_vllm.checkpoint import check_finite, check_pivot_rows
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.ops import pifa_linear, stacked_rows
from pifa_vllm.ops.cpu import load

if TYPE_CHECKING:
    from pifa_vllm.plugin.config import PIFAQuantizationConfig

# What vLLM's models call the shards of their fused layers.
_SHARD_INDEX = {"q": 0, "k": 1, "v": 2}


@dataclass
class Shard:
    """One module of the checkpoint inside a vLLM layer, of full shape [m, n].

    Attributes:
        rank: None if it is dense beside compressed ones: all of its rows are pivot rows then.
        m: set when vLLM tells the layer's shape.
        loaded: suffixes of the tensors that were loaded.
    """

    name: str
    rank: int | None
    m: int = 0
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

    @property
    def coefficients(self) -> tuple[int, int]:
        """Shape of its coefficients, [m - r, r]."""
        return self.m - self.pivots, self.pivots


class PIFALinearMethod(LinearMethodBase):
    """One vLLM layer in pivoting form: a single module, or several fused ones of unequal ranks.

    The pivot weights of the shards are stacked, so that x is multiplied once. `layer` holds

        pivot_weight   [Σr, n]
        coefficients   [Σ (m - r) r], the shards' matrices one after another
        pivot_rows     int32 [Σr over the compressed shards], row numbers within each shard
        out_rows       int32 [Σm], built from pivot_rows when all are loaded (`ops.stacked_rows`)
        weight         [0], which receives the rows of dense shards; LoRA takes device and dtype from it

    All kernels read the factors as the checkpoint has them, so there is nothing to prepack.
    """

    def __init__(self, config: PIFAQuantizationConfig, shards: list[Shard]) -> None:
        self.config = config
        self.shards = shards

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the parameters on the default device.

        Raises:
            UnsupportedModelError: at more than one tensor-parallel rank.
            CheckpointError: if a rank does not fit the layer's shape.
        """
        name, n = layer.prefix, input_size_per_partition
        if layer.tp_size > 1:
            raise UnsupportedModelError(
                f"layer {name}: a PIFA checkpoint is served on one tensor-parallel rank, found tensor "
                f"parallel size {layer.tp_size}. Start vLLM with --tensor-parallel-size 1."
            )
        if len(output_partition_sizes) != len(self.shards):
            raise UnsupportedModelError(
                f"layer {name}: expected the outputs of {[s.name for s in self.shards]}, found "
                f"{len(output_partition_sizes)} parts of sizes {output_partition_sizes}."
            )
        for shard, m in zip(self.shards, output_partition_sizes, strict=True):
            shard.m = m
            if shard.rank is not None and shard.rank > min(m, n):
                raise CheckpointError(
                    f"config.json: quantization_config.ranks[{shard.name!r}]: expected at most "
                    f"{min(m, n)} for a layer of shape [{m}, {n}], found {shard.rank}."
                )

        parameters = {
            "pivot_weight": torch.empty(sum(s.pivots for s in self.shards), n, dtype=params_dtype),
            "coefficients": torch.empty(
                sum(math.prod(s.coefficients) for s in self.shards), dtype=params_dtype
            ),
            "pivot_rows": torch.empty(sum(s.rank or 0 for s in self.shards), dtype=torch.int32),
            "out_rows": torch.empty(sum(output_partition_sizes), dtype=torch.int32),
            "weight": torch.empty(0, dtype=params_dtype),
        }
        for suffix, data in parameters.items():
            parameter = Parameter(data, requires_grad=False)
            # vLLM's protocol. A bound method, because its reloading of weights looks for those to let go of
            # layers; the numel is what it waits for before it processes a layer again.
            set_weight_attrs(parameter, {"suffix": suffix, "weight_loader": MethodType(_load_shard, layer)})
            layer.register_parameter(suffix, parameter)
        set_weight_attrs(layer.out_rows, {"weight_loader_numel": 0})

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check what was loaded, then build the rows of the outputs.

        Raises:
            CheckpointError: naming layer, tensor, expected and found.
        """
        for shard in self.shards:
            for suffix in shard.suffixes:
                if suffix not in shard.loaded:
                    raise CheckpointError(f"{shard.source(suffix)} is missing from the checkpoint.")
            # Should weights be loaded again, the next load is checked by itself.
            shard.loaded.clear()

        pivot_weights = self.split("pivot_weight", layer.pivot_weight)
        coefficients = self.split("coefficients", layer.coefficients)
        for shard, w, c in zip(self.shards, pivot_weights, coefficients, strict=True):
            # In the dtype that is served: a checkpoint's float32 may overflow in float16.
            check_finite(w, f"{shard.source(shard.suffixes[0])} ({w.dtype})")
            check_finite(c, f"{shard.source('coefficients')} ({c.dtype})")

        rows = self.split("pivot_rows", layer.pivot_rows)
        for i, shard in enumerate(self.shards):
            if shard.rank is None:
                rows[i] = torch.arange(shard.m, device=rows[i].device)
        layer.out_rows.copy_(stacked_rows(rows, [shard.m for shard in self.shards]))
        if layer.out_rows.device.type == "cpu":
            load()

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [..., n] to [..., Σm]."""
        ranks, out_features = [s.pivots for s in self.shards], [s.m for s in self.shards]
        return pifa_linear(
            x, layer.pivot_weight, layer.coefficients, layer.out_rows, ranks, out_features, bias
        )

    def split(self, suffix: str, stacked: Tensor) -> list[Tensor]:
        """View a parameter as one tensor per shard."""
        if suffix == "coefficients":
            parts = torch.split(stacked, [math.prod(s.coefficients) for s in self.shards])
            return [part.view(s.coefficients) for part, s in zip(parts, self.shards, strict=True)]
        if suffix == "pivot_rows":
            return list(torch.split(stacked, [s.rank or 0 for s in self.shards]))
        return list(torch.split(stacked, [s.pivots for s in self.shards]))


def _load_shard(
    layer: LinearBase, param: Parameter, loaded_weight: Tensor, shard_id: str | int | None = None
) -> None:
    """Copy one tensor of the checkpoint into its place; vLLM calls this once per shard and parameter."""
    method: PIFALinearMethod = layer.quant_method
    method.config.check_all_matched()
    suffix: str = param.suffix  # type: ignore[attr-defined]  # set by create_weights
    index = _SHARD_INDEX[shard_id] if isinstance(shard_id, str) else shard_id or 0
    shard = method.shards[index]
    source = shard.source(suffix)
    if suffix not in shard.suffixes:
        form = "dense" if shard.rank is None else f"compressed to rank {shard.rank}"
        raise CheckpointError(
            f"{source} is not expected: quantization_config.ranks says the module is {form}."
        )
    if suffix == "pivot_rows":
        check_pivot_rows(loaded_weight, shard.pivots, shard.m, source)
    # A dense module beside compressed ones is all pivot rows.
    stacked = layer.pivot_weight if suffix == "weight" else param
    target = method.split(suffix, stacked.data)[index]
    if target.shape != loaded_weight.shape:
        raise CheckpointError(f"{source}: expected {list(target.shape)}, found {list(loaded_weight.shape)}.")
    target.copy_(loaded_weight)
    shard.loaded.add(suffix)
