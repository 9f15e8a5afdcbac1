"""The linear layer of a PIFA checkpoint in vLLM: its parameters, their loading, its forward pass."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from pifa_vllm.checkpoint import check_finite, check_pivots
from pifa_vllm.checkpoint.validate import check_scale
from pifa_vllm.errors import CheckpointError
from pifa_vllm.ops.cpu import ask_for_large_pages, load
from pifa_vllm.plugin.layout import Layout, Parameters, Shard
from pifa_vllm.plugin.parallel import choose_layout
from pifa_vllm.plugin.view import CheckpointView

# What vLLM's models call the shards of their fused layers.
_SHARD_INDEX = {"q": 0, "k": 1, "v": 2}


class PIFALinearMethod(LinearMethodBase):
    """One vLLM layer in pivoting form: a single module, or several fused ones of unequal ranks.

    `layer` holds the parameters that its layout describes (`pifa_vllm.plugin.layout`), and `weight` [0], which
    receives the rows of dense shards, and from which LoRA takes device and dtype.

    All kernels read the factors as the checkpoint has them, so there is nothing to prepack.
    """

    layout: Layout

    def __init__(self, view: CheckpointView, shards: list[Shard]) -> None:
        self.view = view
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
        """Allocate the parameters of this tensor-parallel rank on the default device.

        Raises:
            UnsupportedModelError: if the layer's parts are not the checkpoint's modules.
            CheckpointError: if a rank or a shape of the checkpoint does not fit the layer.
        """
        self.layout = choose_layout(
            self.view, self.shards, layer, input_size_per_partition, output_partition_sizes
        )
        first = self.shards[0]
        shapes = {
            **self.layout.shapes(),
            first.pivots_name: (sum(s.rank or 0 for s in self.shards),),
            "weight": (0,),
            **({} if first.kind is None else {"weight_scale": (0,)}),
        }
        for suffix, shape in shapes.items():
            dtype = torch.int32 if suffix == "rows" else first.dtype(suffix, params_dtype)
            # LoRA takes the dtype of its own weights from there.
            dtype = params_dtype if suffix == "weight" else dtype
            parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            # vLLM's protocol. A bound method, because its reloading of weights looks for those to let go of layers.
            set_weight_attrs(parameter, {"suffix": suffix, "weight_loader": MethodType(_load_shard, layer)})
            layer.register_parameter(suffix, parameter)
        # Reloading waits for as many numbers under a parameter's name before it processes a layer again.
        awaited = dict.fromkeys(shapes, 0)
        for index, shard in enumerate(self.shards):
            for suffix in shard.suffixes:
                awaited[suffix] += self.part(layer, index, suffix).numel() or 1
        for suffix, numbers in awaited.items():
            set_weight_attrs(getattr(layer, suffix), {"weight_loader_numel": numbers})

    def part(self, layer: LinearBase, index: int, suffix: str) -> Tensor:
        """View what this rank holds of a shard's tensor; empty if that is nothing."""
        if suffix == self.shards[index].pivots_name:
            return torch.split(getattr(layer, suffix).data, [s.rank or 0 for s in self.shards])[index]
        return self.layout.part(index, suffix, _parameters(layer))

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check what was loaded, then build the rows of the outputs.

        Raises:
            CheckpointError: naming layer, tensor, expected and found.
        """
        # Nothing that fails below may leave rows that a kernel would follow out of bounds.
        layer.rows.zero_()
        with self.view.loading():
            self._finish(layer)
            self.view.check_dense(layer.weight.dtype)
        if layer.rows.device.type == "cpu":
            load()
            for factor in (layer.pivot_weight, layer.coefficients):
                ask_for_large_pages(factor)

    def _finish(self, layer: LinearBase) -> None:
        for index, shard in enumerate(self.shards):
            for suffix in shard.suffixes:
                if suffix not in shard.loaded:
                    raise CheckpointError(f"{shard.source(suffix)} is missing from the checkpoint.")
                if suffix != shard.pivots_name:
                    # In the dtype that is served: a checkpoint's float32 may overflow in float16.
                    part = self.part(layer, index, suffix)
                    check = check_scale if suffix.endswith("_scale") else check_finite
                    check(part, f"{shard.source(suffix)} ({part.dtype})")
            # Should weights be loaded again, the next load is checked by itself.
            shard.loaded.clear()

        pivots = [
            torch.arange(shard.size, device=layer.rows.device)
            if shard.rank is None
            else self.part(layer, index, shard.pivots_name)
            for index, shard in enumerate(self.shards)
        ]
        layer.rows.copy_(self.layout.rows(pivots))

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [..., n] to [..., outputs], both of this rank."""
        return self.layout.apply(_parameters(layer), x, bias)


def _parameters(layer: LinearBase) -> Parameters:
    method: PIFALinearMethod = layer.quant_method
    kind = method.shards[0].kind
    factors = (layer.pivot_weight, layer.coefficients, layer.rows)
    if kind is None:
        return Parameters(*factors)
    return Parameters(*factors, layer.pivot_scale, layer.coefficient_scale, kind.group)


def _load_shard(
    layer: LinearBase, param: Parameter, loaded_weight: Tensor, shard_id: str | int | None = None
) -> None:
    """Copy this rank's part of one tensor of the checkpoint; vLLM calls this once per shard and parameter."""
    method: PIFALinearMethod = layer.quant_method
    with method.view.loading():
        # Pipeline ranks build only their own layers, and skip the tensors of the others.
        if get_pp_group().world_size == 1:
            method.view.check_all_matched()
        _copy_shard(layer, method, param, loaded_weight, shard_id)


def _copy_shard(
    layer: LinearBase,
    method: PIFALinearMethod,
    param: Parameter,
    loaded_weight: Tensor,
    shard_id: str | int | None,
) -> None:
    suffix: str = param.suffix  # type: ignore[attr-defined]  # set by create_weights
    index = _SHARD_INDEX[shard_id] if isinstance(shard_id, str) else shard_id or 0
    shard = method.shards[index]
    source = shard.source(suffix)
    if suffix not in shard.suffixes:
        form = "dense" if shard.rank is None else f"compressed to rank {shard.rank}"
        raise CheckpointError(
            f"{source} is not expected: quantization_config.ranks says the module is {form}."
        )
    if suffix == shard.pivots_name:
        check_pivots(loaded_weight, shard.pivots, shard.size, source)
    elif list(loaded_weight.shape) != shard.shape(suffix):
        raise CheckpointError(f"{source}: expected {shard.shape(suffix)}, found {list(loaded_weight.shape)}.")
    else:
        loaded_weight = method.layout.cut(index, suffix, loaded_weight)
    part = method.part(layer, index, suffix)
    if shard.kind is not None and loaded_weight.dtype != part.dtype:
        raise CheckpointError(f"{source}: expected {part.dtype}, found {loaded_weight.dtype}.")
    part.copy_(loaded_weight)
    if not part.numel():
        # Reloading counts the numbers that are copied, and must not take a layer for complete before this came.
        torch.empty(1).copy_(torch.zeros(1))
    shard.loaded.add(suffix)
