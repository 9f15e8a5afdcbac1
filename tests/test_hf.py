"""transformers loads PIFA checkpoints as PIFA layers, equal to the dense weights they stand for, or not at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pifa_vllm.checkpoint import Checkpoint, FactorFormat, read_json
from pifa_vllm.compression.options import FACTORS
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.hf import PIFAQuantizationConfig, check_architecture
from pifa_vllm.layers import PIFALinear
from tests.conftest import Twins
from tests.edit import copy_edited
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

Q = "model.layers.0.self_attn.q_proj"
TOKENS = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS.to(model.device)).logits.float()


def pifa_layers(model: nn.Module) -> dict[str, PIFALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PIFALinear)}


def test_the_layers_are_pifa_and_compute_what_the_dense_weights_do(twins: Twins) -> None:
    model, dense = load(twins.pifa), load(twins.dense)
    ranks = read_json(twins.pifa / "config.json")["quantization_config"]["ranks"]
    assert {name: layer.rank for name, layer in pifa_layers(model).items()} == ranks
    assert not any(f"{name}.weight" in model.state_dict() for name in ranks)
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert (logits(load(twins.original)) - logits(dense)).abs().max() > 0.1, "the truncation must be visible"


def test_greedy_generation_with_cache_and_padding_matches(twins: Twins) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :20] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 257}
    assert torch.equal(
        load(twins.pifa).generate(TOKENS, **options), load(twins.dense).generate(TOKENS, **options)
    )


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"tie_word_embeddings": False, "kv_heads": 4}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {}),
    ],
)
def test_architectures(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    save_tiny_model(tmp_path / "original", architecture, **settings)
    kept = {"q_proj": 16, "v_proj": 0, "o_proj": 1, "up_proj": 64, "down_proj": 40}
    save_pifa_twin(
        tmp_path / "original",
        tmp_path / "pifa",
        tmp_path / "dense",
        ranks=lambda name, m, n: kept.get(name.rpartition(".")[2]),
    )
    model = load(tmp_path / "pifa")
    assert {layer.rank for layer in pifa_layers(model).values()} == set(kept.values())
    torch.testing.assert_close(logits(model), logits(load(tmp_path / "dense")), rtol=1e-4, atol=1e-4)
    has_bias = pifa_layers(model)[Q].bias is not None
    assert has_bias == (architecture == "qwen2")
    assert check_architecture(Checkpoint.open(tmp_path / "pifa")) == type(model).__name__


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_dtypes_reach_the_factors(twins: Twins, dtype: torch.dtype, bound: float) -> None:
    model = load(twins.pifa, dtype=dtype)
    for layer in pifa_layers(model).values():
        assert layer.pivot_weight.dtype == layer.coefficients.dtype == dtype
        assert layer.pivot_rows.dtype == torch.int32
        assert layer.out_rows.dtype == torch.int32
    expected = logits(load(twins.dense))
    assert float((logits(model) - expected).norm() / expected.norm()) < bound


def test_saving_gives_the_checkpoint_back(twins: Twins, tmp_path: Path) -> None:
    model = load(twins.pifa)
    model.save_pretrained(tmp_path / "saved")
    saved, source = Checkpoint.open(tmp_path / "saved"), Checkpoint.open(twins.pifa)
    saved.verify()
    assert saved.config == source.config
    assert saved.shards.entries.keys() == source.shards.entries.keys()
    for name in source.shards.entries:
        assert torch.equal(saved.shards.load(name), source.shards.load(name))
    assert check_architecture(saved) == "LlamaForCausalLM"
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_saving_in_another_dtype_and_several_shards(twins: Twins, tmp_path: Path) -> None:
    model = load(twins.pifa, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    saved = Checkpoint.open(tmp_path / "saved")
    saved.verify()
    assert len({entry.file for entry in saved.shards.entries.values()}) > 1
    assert {module.dtype for module in saved.modules.values()} == {torch.bfloat16}
    assert torch.equal(logits(load(tmp_path / "saved", dtype="auto")), logits(model))


def test_dequantize_gives_an_ordinary_model(twins: Twins, tmp_path: Path) -> None:
    model = load(twins.pifa).dequantize()
    assert not pifa_layers(model)
    assert torch.equal(logits(model), logits(load(twins.dense)))
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in read_json(tmp_path / "saved" / "config.json")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_the_base_model_without_its_head(twins: Twins) -> None:
    model, whole = AutoModel.from_pretrained(twins.pifa), load(twins.pifa)
    assert len(pifa_layers(model)) == len(pifa_layers(whole))
    assert torch.equal(model(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(twins: Twins, device_map: object) -> None:
    assert torch.equal(logits(load(twins.pifa, device_map=device_map)), logits(load(twins.pifa)))


def test_offloading_a_layer_to_disk(twins: Twins, tmp_path: Path) -> None:
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(twins.pifa, device_map=device_map, offload_folder=tmp_path / "offload")
    assert pifa_layers(model)["model.layers.1.self_attn.q_proj"].pivot_weight.is_meta
    assert torch.equal(logits(model), logits(load(twins.pifa)))


def test_other_pivot_rows_from_a_state_dict_take_effect(twins: Twins) -> None:
    layer = pifa_layers(load(twins.pifa))[Q]
    state = layer.state_dict()
    assert sorted(state) == ["coefficients", "pivot_rows", "pivot_weight"]
    x = torch.randn(3, layer.in_features)
    state["pivot_rows"] = torch.arange(layer.rank, dtype=torch.int32)
    layer.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[:, : layer.rank], x @ state["pivot_weight"].T)
        torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-5)
    state["pivot_rows"] = state["pivot_rows"] + layer.out_features
    with pytest.raises(CheckpointError, match=r"expected rows in \[0, 64\), found 95"):
        layer.load_state_dict(state)


def nan_in(name: str) -> Any:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(math.nan)


ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "missing dense tensor": (
        {"tensors": lambda t: t.pop("model.norm.weight")},
        r"tensor model\.norm\.weight is missing; LlamaForCausalLM expects it with shape \[64\]",
    ),
    "missing embedding, to which the head is tied": (
        {"tensors": lambda t: t.pop("model.embed_tokens.weight")},
        r"tensor (model\.embed_tokens|lm_head)\.weight is missing",
    ),
    "missing factor": (
        {"tensors": lambda t: t.pop(f"{Q}.coefficients")},
        rf"tensor {Q}\.coefficients is missing",
    ),
    "dense tensor of another shape": (
        {"tensors": lambda t: t.update({"model.norm.weight": torch.ones(63)})},
        r"tensor model\.norm\.weight: LlamaForCausalLM expects \[64\] by hidden_size in config\.json, found \[63\]",
    ),
    "factors of another matrix": (
        {"tensors": lambda t: t.update({f"{Q}.coefficients": torch.ones(33, 32)})},
        rf"module {Q}: LlamaForCausalLM expects \[out, in\] \[64, 64\] by .* make \[65, 64\]",
    ),
    "a bias that the model does not have": (
        {"tensors": lambda t: t.update({f"{Q}.bias": torch.ones(64)})},
        rf"module {Q}: .*\(64, 64, False\).*make \(64, 64, True\)",
    ),
    "factors of an embedding": (
        {
            "config": lambda c: c["quantization_config"]["ranks"].update({"model.embed_tokens": 2}),
            "tensors": lambda t: (
                t.update(
                    {
                        "model.embed_tokens.pivot_weight": torch.ones(2, 64),
                        "model.embed_tokens.coefficients": torch.ones(256, 2),
                        "model.embed_tokens.pivot_rows": torch.arange(2, dtype=torch.int32),
                    }
                )
                or t.pop("model.embed_tokens.weight")
            ),
        },
        r"ranks names model\.embed_tokens, expected a linear layer",
    ),
    "wrong rank": (
        {"config": lambda c: c["quantization_config"]["ranks"].update({Q: 31})},
        r"expected \[31, in\]",
    ),
    "unknown key": (
        {"config": lambda c: c["quantization_config"].update(bits=4)},
        r"quantization_config\.bits",
    ),
    "future format": (
        {"config": lambda c: c["quantization_config"].update(format_version=9)},
        "Update pifa-vllm",
    ),
    "rows out of range": (
        {"tensors": lambda t: t[f"{Q}.pivot_rows"][-1:].fill_(64)},
        rf"tensor {Q}\.pivot_rows: expected rows in \[0, 64\), found 64",
    ),
    "unsorted rows": (
        {"tensors": lambda t: t[f"{Q}.pivot_rows"][:1].fill_(60)},
        "strictly increasing rows, found 60",
    ),
    "NaN in a factor": ({"tensors": nan_in(f"{Q}.coefficients")}, rf"tensor {Q}\.coefficients .*found 1 NaN"),
    "NaN in a dense tensor": (
        {"tensors": nan_in("model.norm.weight")},
        r"tensor model\.norm\.weight .*found 1 NaN",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_checkpoints_do_not_load(twins: Twins, tmp_path: Path, attack: str) -> None:
    edits, message = ATTACKS[attack]
    directory = copy_edited(twins.pifa, tmp_path / "spoiled", **edits)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_a_truncated_shard_does_not_load(twins: Twins, tmp_path: Path) -> None:
    directory = copy_edited(twins.pifa, tmp_path / "spoiled")
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load(directory)


def test_values_that_the_dtype_cannot_hold_do_not_load(twins: Twins, tmp_path: Path) -> None:
    directory = copy_edited(
        twins.pifa, tmp_path / "spoiled", tensors=lambda t: t[f"{Q}.pivot_weight"].view(-1)[:1].fill_(1e6)
    )
    load(directory)
    with pytest.raises(
        CheckpointError, match=rf"tensor {Q}\.pivot_weight as torch\.float16: expected finite"
    ):
        load(directory, dtype=torch.float16)


def test_another_config_than_the_checkpoints_is_refused(twins: Twins) -> None:
    config = AutoConfig.from_pretrained(twins.pifa)
    config.quantization_config["ranks"] = {}
    with pytest.raises(
        CheckpointError, match="ranks of the config that was passed to from_pretrained differ"
    ):
        load(twins.pifa, config=config)


def test_transformers_does_not_compress_on_the_fly(twins: Twins) -> None:
    section = read_json(twins.pifa / "config.json")["quantization_config"]
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(twins.original, quantization_config=PIFAQuantizationConfig(**section))


def test_the_architecture_check_names_what_does_not_belong(twins: Twins, tmp_path: Path) -> None:
    extra = copy_edited(
        twins.pifa, tmp_path / "extra", tensors=lambda t: t.update({"model.more": torch.ones(2)})
    )
    with pytest.raises(CheckpointError, match=r"tensor model\.more is unexpected; LlamaForCausalLM has none"):
        check_architecture(Checkpoint.open(extra))
    legacy = copy_edited(
        twins.pifa,
        tmp_path / "legacy",
        tensors=lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    assert check_architecture(Checkpoint.open(legacy)) == "LlamaForCausalLM"
    unknown = copy_edited(twins.pifa, tmp_path / "unknown", config=lambda c: c.update(model_type="mystery"))
    with pytest.raises(
        UnsupportedModelError, match=r"config\.json: model_type: expected one of llama, .*found 'mystery'"
    ):
        Checkpoint.open(unknown)
    odd = copy_edited(twins.pifa, tmp_path / "odd", config=lambda c: c.update(hidden_act="mystery"))
    with pytest.raises(
        UnsupportedModelError, match=r"config\.json: transformers makes no causal language model"
    ):
        check_architecture(Checkpoint.open(odd))


def test_it_trains_as_an_ordinary_model_does(twins: Twins) -> None:
    """transformers' Trainer asks these two before it takes a quantised model without an adapter."""
    model = load(twins.pifa)
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer in pifa_layers(model).values():
        assert float(layer.pivot_weight.grad.norm()) > 0
        assert float(layer.coefficients.grad.norm()) > 0


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_reaches_the_layers(twins: Twins, grad: bool) -> None:
    """Their kernels take one dtype; under autocast inputs and factors have two."""
    model, x = load(twins.pifa), torch.randn(3, 64)
    layer = next(iter(pifa_layers(model).values()))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        model(TOKENS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("kind", FACTORS.values(), ids=list(FACTORS))
def test_quantized_layers_keep_their_dtypes_and_are_saved_as_they_were(
    kind: FactorFormat, tmp_path: Path
) -> None:
    dense = save_tiny_model(tmp_path / "dense", "qwen2")
    save_pifa_twin(
        dense, tmp_path / "pifa", tmp_path / "twin", ranks=lambda _, m, n: min(m, n) // 2, kind=kind
    )
    load(tmp_path / "pifa").to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    before, after = Checkpoint.open(tmp_path / "pifa"), Checkpoint.open(tmp_path / "saved")
    after.verify()
    for name in before.modules:
        assert torch.equal(after.load(name).dense(), before.load(name).dense())
