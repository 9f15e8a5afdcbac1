"""What vLLM asks the plugin about a checkpoint before any layer exists."""

import pickle

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.models.utils import WeightsMapper

from pifa_vllm.checkpoint import PIFAConfig
from pifa_vllm.errors import CheckpointError
from pifa_vllm.plugin.config import PIFAQuantizationConfig


def test_the_section_of_config_json_is_validated():
    section = {"quant_method": "pifa", "format_version": 1, "density": 0.5, "ranks": {"a.q_proj": 3}}
    assert PIFAQuantizationConfig.from_config(section).view.ranks == {"a.q_proj": 3}
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config.ranks"):
        PIFAQuantizationConfig.from_config({**section, "ranks": {"a.q_proj": "3"}})
    with pytest.raises(CheckpointError, match="format_version 3"):
        PIFAQuantizationConfig.from_config({**section, "format_version": 3})


def test_names_follow_the_models_own_renaming():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={"model.layers.0.o_proj": 3}))
    config.view.tensors = {"model.layers.0.o_proj.pivot_weight", "lm_head.weight"}
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    config.apply_vllm_mapper(mapper.get_rename_mapper())
    assert config.view.ranks == {"language_model.model.layers.0.o_proj": 3}
    assert "language_model.model.layers.0.o_proj.pivot_weight" in config.view.tensors


def test_layers_that_are_no_linear_ones_keep_their_method():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={"embed": 3}))
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "embed") is None


def test_it_travels_to_the_engine_process():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={"a": 3}))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    copy = pickle.loads(pickle.dumps(config))
    assert copy.view.ranks == {"a": 3}
    assert copy.packed_modules_mapping == config.packed_modules_mapping
