"""What the plugin reads of a checkpoint before any layer exists."""

import pickle

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.models.utils import WeightsMapper

from pifa_vllm.checkpoint import Checkpoint, PIFAConfig
from pifa_vllm.errors import CheckpointError
from pifa_vllm.plugin.config import PIFAQuantizationConfig
from tests.edit import copy_edited


def test_the_section_of_config_json_is_validated():
    section = {"quant_method": "pifa", "format_version": 1, "density": 0.5, "ranks": {"a.q_proj": 3}}
    assert PIFAQuantizationConfig.from_config(section).ranks == {"a.q_proj": 3}
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config.ranks"):
        PIFAQuantizationConfig.from_config({**section, "ranks": {"a.q_proj": "3"}})
    with pytest.raises(CheckpointError, match="format_version 2"):
        PIFAQuantizationConfig.from_config({**section, "format_version": 2})


def test_a_local_checkpoint_is_checked_before_the_engine_starts(twins, tmp_path):
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={}))
    config.maybe_update_config(str(twins.pifa))
    assert "model.layers.0.self_attn.k_proj.weight" in config.tensors

    name = "model.layers.1.mlp.up_proj"

    def out_of_range(tensors):
        tensors[f"{name}.pivot_rows"][-1] = 10_000

    spoilt = copy_edited(twins.pifa, tmp_path / "spoilt", tensors=out_of_range)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {name}.pivot_rows: .*found 10000"):
        PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={})).maybe_update_config(str(spoilt))


def test_dense_tensors_are_read_once_in_the_dtype_that_is_served(twins, tmp_path, monkeypatch):
    def make(directory):
        config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={}))
        config.maybe_update_config(str(directory))
        return config

    name = "model.norm.weight"
    large = copy_edited(twins.pifa, tmp_path / "large", tensors=lambda t: t[name].fill_(1e6))
    make(large).check_dense(torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: tensor {name} as torch.float16: .*found 64 NaN"
    ):
        make(large).check_dense(torch.float16)

    config = make(twins.pifa)
    config.check_dense(torch.float32)
    monkeypatch.setattr(Checkpoint, "check_dense", lambda *_: pytest.fail("read again"))
    config.check_dense(torch.float32)


@pytest.mark.parametrize("model", ["", "s3://bucket/model"])
def test_what_cannot_be_read_here_is_left_to_vllms_loader(model):
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={}))
    config.maybe_update_config(model or "a/b")
    config.model = model
    config.check_dense(torch.float32)


def test_a_model_on_a_hub_is_checked_while_loading_only():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={}))
    config.maybe_update_config("somebody/some-model")
    assert config.tensors is None


def test_names_follow_the_models_own_renaming():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={"model.layers.0.o_proj": 3}))
    config.tensors = {"model.layers.0.o_proj.pivot_weight", "lm_head.weight"}
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    config.apply_vllm_mapper(mapper.get_rename_mapper())
    assert config.ranks == {"language_model.model.layers.0.o_proj": 3}
    assert "language_model.model.layers.0.o_proj.pivot_weight" in config.tensors


def test_layers_that_are_no_linear_ones_keep_their_method():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={"embed": 3}))
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "embed") is None


def test_it_travels_to_the_engine_process():
    config = PIFAQuantizationConfig(PIFAConfig(density=0.5, ranks={"a": 3}))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    copy = pickle.loads(pickle.dumps(config))
    assert copy.ranks == {"a": 3}
    assert copy._shard_names("x.qkv_proj") == ["x.q_proj", "x.k_proj", "x.v_proj"]
    assert copy._shard_names("lm_head") == ["lm_head"]
