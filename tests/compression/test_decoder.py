"""The staged layer against each model's own forward."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from tests.tiny import save_tiny_model

CASES = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-rope-scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-mha": {"kv_heads": 4},
    "mistral-window": {"sliding_window": 16},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
}


@pytest.mark.parametrize("case", CASES)
def test_stages_equal_the_models_forward(case, tmp_path):
    directory = save_tiny_model(tmp_path / "m", case.split("-")[0], layers=3, **CASES[case])
    model = AutoModelForCausalLM.from_pretrained(directory)
    staged = DenseModel(directory)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.model(tokens, output_hidden_states=True).hidden_states
        hidden = staged.embed(tokens)
        for index in range(staged.layers):
            torch.testing.assert_close(hidden, expected[index], rtol=1e-5, atol=1e-5)
            layer, _ = staged.layer_twice(index, torch.device("cpu"))
            hidden = layer.attention_output(hidden, layer.attention(hidden))
            hidden = layer.mlp_output(hidden, layer.mlp(hidden))
        torch.testing.assert_close(model.model.norm(hidden), expected[-1], rtol=1e-5, atol=1e-5)


def test_sharded_models_are_read_by_name(tmp_path):
    whole = DenseModel(save_tiny_model(tmp_path / "whole"))
    cut = DenseModel(save_tiny_model(tmp_path / "cut", max_shard_size="60KB"))
    assert len({entry.file for entry in cut.shards.entries.values()}) > 2
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(whole.shards.load(name), cut.shards.load(name))


def test_every_tensor_is_a_linear_a_norm_or_outside_the_layers(tmp_path):
    model = DenseModel(save_tiny_model(tmp_path / "m", "qwen2"))
    named = set(model.untouched_tensors())
    for layer in range(model.layers):
        named |= set(model.norm_tensors(layer))
    linear = {x.name for x in model.linears()}
    rest = set(model.shards.entries) - named
    assert rest
    assert {name.rsplit(".", 1)[0] for name in rest} == linear


def test_unknown_architecture_is_refused_by_name(tmp_path):
    directory = save_tiny_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"config\.json.*LlamaForCausalLM.*found GPT2LMHeadModel"):
        DenseModel(directory)


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 0}, {"hidden_size": "wide"}, {"model_type": "unheard-of"}]
)
def test_nonsense_in_the_config_is_one_paragraph(tmp_path, change):
    directory = save_tiny_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json: transformers cannot make a model of it"):
        DenseModel(directory)


def test_quantised_models_are_refused(tmp_path):
    directory = save_tiny_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="gptq"):
        DenseModel(directory)


def test_missing_truncated_and_misshapen_weights_are_named(tmp_path):
    directory = save_tiny_model(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    broken = tmp_path / "broken"

    def fresh():
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(directory, broken)
        return broken / "model.safetensors"

    path = fresh()
    kept = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        DenseModel(broken)

    path = fresh()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        DenseModel(broken)

    path = fresh()
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight: expected floating \[64\]"):
        DenseModel(broken)

    path = fresh()
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight.*1 NaN"):
        DenseModel(broken).check_finite()
