"""Sizes in config.json: what transformers would build is what the shards must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from pifa_vllm.checkpoint import TensorEntry
from pifa_vllm.checkpoint.sizes import FAMILIES, check_sizes, read_sizes
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.sample import CONFIG


def entries(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(Path("dir/x.safetensors"), shape, torch.float32) for name, shape in shapes.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (4, 2), (4, 4), (6, 3)]),
    st.one_of(st.none(), st.sampled_from([2, 8, 16])),
    st.integers(1, 9),
    st.booleans(),
)
def test_shapes_are_those_of_the_model_that_transformers_builds(
    family: str, layers: int, heads: tuple[int, int], head_dim: int | None, intermediate: int, tied: bool
) -> None:
    asked: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 4 * heads[0],
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": tied,
        **({} if head_dim is None else {"head_dim": head_dim}),
    }
    config = AutoConfig.for_model(family, **asked)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith(".bias")
    }
    # As it was asked for, without what transformers fills in, and as it is saved.
    for raw in ({**asked, "model_type": family}, config.to_dict()):
        sizes = read_sizes(raw, "config.json")
        shapes = {name: shape for name, shape, _ in sizes.shapes("model.")}
        assert shapes == {name: shape for name, shape in built.items() if name != "lm_head.weight"}
        check_sizes(sizes, Path("dir"), entries(built), {})


def test_the_base_model_has_no_prefix() -> None:
    sizes = read_sizes({**CONFIG, "architectures": ["LlamaModel"]}, "config.json")
    shapes = {name: shape for name, shape, _ in sizes.shapes("")}
    check_sizes(sizes, Path("dir"), entries(shapes), {})


def test_compressed_modules_stand_for_their_matrices() -> None:
    sizes = read_sizes(CONFIG, "config.json")
    shapes = {name: shape for name, shape, _ in sizes.shapes("model.")}
    module = "model.layers.0.mlp.up_proj"
    del shapes[f"{module}.weight"]
    shapes[f"{module}.pivot_weight"] = (2, 5)
    check_sizes(sizes, Path("dir"), entries(shapes), {module: (9, 5)})
    with pytest.raises(
        CheckpointError,
        match=r"module model\.layers\.0\.mlp\.up_proj: .* expects \[out, in\] \[9, 5\] by .*\[8, 5\]",
    ):
        check_sizes(sizes, Path("dir"), entries(shapes), {module: (8, 5)})
    with pytest.raises(
        CheckpointError, match=r"ranks names lm_head, expected a linear layer of LlamaForCausalLM"
    ):
        check_sizes(sizes, Path("dir"), entries(shapes), {module: (9, 5), "lm_head": (7, 5)})


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144},
        {"rope_type": "default", "rope_theta": 1e6},
        {"full_attention": {"rope_type": "linear", "factor": 2}},
        None,
    ],
)
def test_rope_scaling_of_real_models_is_taken(parameters: dict[str, Any] | None) -> None:
    for field in ("rope_parameters", "rope_scaling"):
        read_sizes({**CONFIG, "max_position_embeddings": 131_072, field: parameters}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, mistral, qwen2, qwen3, found 'gpt2'"),
        ({"model_type": ["llama"]}, r"model_type: expected .*found \['llama'\]"),
    ],
)
def test_other_kinds_of_models_are_not_supported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^config\.json: {message}"):
        read_sizes({**CONFIG, **change}, "config.json")
