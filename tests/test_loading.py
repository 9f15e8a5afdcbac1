"""`pifa_vllm.load`: a model that generates, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pifa_vllm.errors import CheckpointError, PifaError
from pifa_vllm.layers import PIFALinear
from pifa_vllm.loading import load
from tests.conftest import Twins
from tests.edit import copy_edited

TOKENS = torch.arange(20)[None]


def test_a_checkpoint_generates_what_its_dense_twin_does(twins: Twins) -> None:
    model = load(str(twins.pifa))
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), PIFALinear)
    assert not model.training
    dense = AutoModelForCausalLM.from_pretrained(twins.dense)
    found, expected = (
        each.generate(TOKENS, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(TOKENS))
        for each in (model, dense)
    )
    assert torch.equal(found, expected)


def test_the_dtype_is_the_checkpoints_or_the_given_one(twins: Twins) -> None:
    assert load(twins.pifa).dtype == torch.float32
    assert load(twins.pifa, dtype="bfloat16").dtype == torch.bfloat16


def test_damaged_and_unknown_models(twins: Twins, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load(tmp_path / "nowhere")
    truncated = copy_edited(twins.dense, tmp_path / "truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(truncated)
    unknown = copy_edited(twins.dense, tmp_path / "unknown", config=lambda c: c.update(model_type="mystery"))
    with pytest.raises(CheckpointError, match=r"unknown: transformers cannot load this model \(.*mystery"):
        load(unknown)


def test_tensors_that_transformers_would_make_up(twins: Twins, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = copy_edited(twins.dense, tmp_path / "incomplete", tensors=lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=rf"incomplete: tensor {name} is missing; LlamaForCausalLM"):
        load(directory)


def test_tensors_of_another_shape(twins: Twins, tmp_path: Path) -> None:
    directory = copy_edited(
        twins.dense, tmp_path / "other", tensors=lambda t: t.update({"model.norm.weight": torch.ones(63)})
    )
    with pytest.raises(CheckpointError, match="other: transformers cannot load this model") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there(twins: Twins) -> None:
    with pytest.raises(PifaError, match="expected a device that torch can use, found 'abacus'"):
        load(twins.dense, device="abacus")
