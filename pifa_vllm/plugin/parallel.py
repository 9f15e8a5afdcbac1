"""Which layout a vLLM layer gets on its tensor-parallel rank, and the collectives that the layouts use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_reduce_scatter,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear

from pifa_vllm.checkpoint.schema import PIVOT_COLUMNS
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.plugin.column import ColumnLayout
from pifa_vllm.plugin.layout import Layout, Shard, WholeLayout
from pifa_vllm.plugin.pivot_columns import PivotColumnsLayout
from pifa_vllm.plugin.row import RowLayout
from pifa_vllm.plugin.view import CheckpointView


def choose_layout(
    view: CheckpointView,
    shards: list[Shard],
    layer: LinearBase,
    inputs: int,
    outputs: Sequence[int],
) -> Layout:
    """Set the shards' full shapes and choose what this rank holds of them.

    Args:
        view: knows the checkpoint's pivot rows.
        shards: of the layer.
        layer: not yet loaded.
        inputs: input features of this rank.
        outputs: of this rank, by shard.

    Raises:
        UnsupportedModelError: if the layer's parts are not the shards.
        CheckpointError: if a rank or a shape of the checkpoint does not fit the layer.
    """
    if len(outputs) != len(shards):
        raise UnsupportedModelError(
            f"layer {layer.prefix}: expected the outputs of {[s.name for s in shards]}, found "
            f"{len(outputs)} parts of sizes {list(outputs)}."
        )
    column = layer.tp_size > 1 and isinstance(layer, ColumnParallelLinear)
    row = layer.tp_size > 1 and isinstance(layer, RowParallelLinear)
    # Where there are fewer key and value heads than ranks, several ranks hold the same.
    replicas = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * 2][: len(shards)]
    for shard, m, copies in zip(shards, outputs, replicas, strict=True):
        shard.m = m * layer.tp_size // copies if column else m
        shard.n = inputs * layer.tp_size if row else inputs
        if shard.rank is not None and shard.rank > min(shard.m, shard.n):
            raise CheckpointError(
                f"config.json: quantization_config.ranks[{shard.name!r}]: expected at most "
                f"{min(shard.m, shard.n)} for a layer of shape [{shard.m}, {shard.n}], found {shard.rank}."
            )
    if row:
        begin, unit = layer.tp_rank * inputs, shards[0].unit("pivot_weight")
        if inputs % unit:
            raise UnsupportedModelError(
                f"layer {shards[0].name}: expected a tensor parallel size that leaves each rank a multiple of the "
                f"{unit} inputs that are quantized together, found {layer.tp_size}, which leaves it {inputs}."
            )
        return RowLayout(shards[0], (begin, begin + inputs), layer.tp_rank, layer.tp_size, _reduce_scatter)
    begins = [
        layer.tp_rank // copies * m if column else 0 for m, copies in zip(outputs, replicas, strict=True)
    ]
    own = [(begin, begin + m) for begin, m in zip(begins, outputs, strict=True)]
    if shards[0].pivots_name == PIVOT_COLUMNS:
        return PivotColumnsLayout(shards, own)
    if column:
        return ColumnLayout(
            shards,
            own,
            [None if s.rank is None else view.pivot_rows(s.name, s.m) for s in shards],
            layer.tp_rank,
            layer.tp_size,
            _all_gather,
        )
    return WholeLayout(shards)


def _all_gather(y: Tensor) -> Tensor:
    """[..., share] to the [..., t·share] of all ranks."""
    gathered: Tensor = tensor_model_parallel_all_gather(y)
    return gathered


def _reduce_scatter(y: Tensor) -> Tensor:
    """[..., t·share] to the sum over the ranks of this rank's [..., share]."""
    if y.device.type != "cpu":
        # vLLM exchanges the last axis with the first by moving the first only, which is right of two axes; its
        # Transformers backend has three.
        own: Tensor = tensor_model_parallel_reduce_scatter(y.flatten(0, -2))
        return own.reshape(*y.shape[:-1], own.shape[-1])
    # vLLM's CPU communicator reduces in shared memory where it can, but scatters through torch.distributed only.
    share = y.shape[-1] // get_tensor_model_parallel_world_size()
    begin = get_tensor_model_parallel_rank() * share
    summed: Tensor = tensor_model_parallel_all_reduce(y)
    return summed[..., begin : begin + share]
