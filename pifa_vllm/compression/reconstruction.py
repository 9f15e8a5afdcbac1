"""M: compressing one decoder layer between the dense and the compressed flow (MPIFA, section 4).

Every stage of the layer runs once per flow. A group's modules are solved as soon as the moments of their inputs
are complete, and the compressed flow goes on through what was just stored, so later modules see, and correct,
the error of the ones before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pifa_vllm.compression.decoder import GROUPS, StagedLayer
from pifa_vllm.compression.moments import Moments

# Given a module's path in the layer, its weight [m, n] and its group's moments, returns the weight that the
# compressed model will really use, in float32 (the dense one for modules that stay dense).
Solve = Callable[[str, Tensor, Moments], Tensor]


@dataclass
class LayerActivations:
    """Hidden states of both flows around one layer, and room for one intermediate activation.

    All are [samples, length, features] in the storage dtype, usually mapped files.
    """

    dense_in: Tensor
    compressed_in: Tensor
    dense_out: Tensor
    compressed_out: Tensor
    context: Tensor
    intermediate: Tensor


def reconstruct_layer(
    dense: StagedLayer,
    compressed: StagedLayer,
    states: LayerActivations,
    solve: Solve,
    *,
    chunk: int,
    device: torch.device,
    dense_gram: bool = False,
    drift: bool = False,
    folds: int = 1,
) -> float:
    """Compress one layer and move both flows past it.

    Args:
        dense: the layer with its original weights.
        compressed: the same layer; its weights are replaced as they are solved.
        states: `*_in` are read, `*_out` are written.
        solve: decides each module's new weight.
        chunk: samples per forward pass.
        device: where the layers lie.
        dense_gram: see `Moments`.
        drift: accumulate the residual stream's error for o and down, see `Moments`.
        folds: see `Moments`.

    Returns:
        ‖h - h_o‖ / ‖h_o‖ over the hidden states that leave the layer, h compressed and h_o dense.
    """

    def chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        for start in range(0, states.dense_in.shape[0], chunk):
            part = slice(start, start + chunk)
            yield part, [tensor[part].to(device, torch.float32) for tensor in tensors]

    def moments(features: int, stream: int | None = None) -> Moments:
        return Moments(features, device, stream=stream, dense_gram=dense_gram, folds=folds)

    def settle(group: str, collected: Moments) -> None:
        for name in GROUPS[group]:
            compressed.replace_weight(name, solve(name, dense.linears[name].weight, collected))

    hidden_size = states.dense_in.shape[-1]
    stream = hidden_size if drift else None

    inputs = moments(hidden_size)
    for _, (h_o, h) in chunks(states.dense_in, states.compressed_in):
        inputs.add(dense.attention_input(h_o), compressed.attention_input(h))
    settle("qkv", inputs)

    inputs = moments(states.context.shape[-1], stream)
    for part, (h_o, h) in chunks(states.dense_in, states.compressed_in):
        c_o, c = dense.attention(h_o), compressed.attention(h)
        inputs.add(c_o, c, h_o - h)
        states.context[part] = c
        states.dense_out[part] = dense.attention_output(h_o, c_o)
    settle("o", inputs)

    inputs = moments(hidden_size)
    for part, (h, c, h_o) in chunks(states.compressed_in, states.context, states.dense_out):
        h = compressed.attention_output(h, c)
        inputs.add(dense.mlp_input(h_o), compressed.mlp_input(h))
        states.compressed_out[part] = h
    settle("gate_up", inputs)

    inputs = moments(states.intermediate.shape[-1], stream)
    for part, (h_o, h) in chunks(states.dense_out, states.compressed_out):
        d_o, d = dense.mlp(h_o), compressed.mlp(h)
        inputs.add(d_o, d, h_o - h)
        states.intermediate[part] = d
        states.dense_out[part] = dense.mlp_output(h_o, d_o)
    settle("down", inputs)

    difference = scale = 0.0
    for part, (h, d, h_o) in chunks(states.compressed_out, states.intermediate, states.dense_out):
        h = compressed.mlp_output(h, d)
        states.compressed_out[part] = h
        difference += float((h - h_o).square().sum(dtype=torch.float64))
        scale += float(h_o.square().sum(dtype=torch.float64))
    return (difference / scale) ** 0.5 if scale > 0.0 else 0.0
