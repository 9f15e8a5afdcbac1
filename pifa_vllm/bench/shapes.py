"""The linear layers of the models that the layer benchmarks and the cost model speak of, as vLLM fuses them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One linear layer of a decoder block, possibly several matrices that share their input.

    Attributes:
        name: the layer's name in vLLM's model.
        n: input features.
        out_features: m per shard, in the order of their outputs.
    """

    name: str
    n: int
    out_features: tuple[int, ...]

    @property
    def m(self) -> int:
        """Output features of all shards."""
        return sum(self.out_features)


def _llama(hidden: int, key_value: int, intermediate: int) -> tuple[LayerShape, ...]:
    return (
        LayerShape("qkv_proj", hidden, (hidden, key_value, key_value)),
        LayerShape("o_proj", hidden, (hidden,)),
        LayerShape("gate_up_proj", hidden, (intermediate, intermediate)),
        LayerShape("down_proj", intermediate, (hidden,)),
    )


# From hidden_size, num_key_value_heads · head_dim and intermediate_size of the models' config.json.
SHAPES: dict[str, tuple[LayerShape, ...]] = {
    "llama2-7b": _llama(4096, 4096, 11008),
    "llama2-13b": _llama(5120, 5120, 13824),
    "llama2-70b": _llama(8192, 1024, 28672),
    "llama3-8b": _llama(4096, 1024, 14336),
}

# num_hidden_layers.
LAYERS = {"llama2-7b": 32, "llama2-13b": 40, "llama2-70b": 80, "llama3-8b": 32}
