"""The dense model, one decoder layer at a time, cut into the stages that M looks between.

A LLaMA-style decoder layer has four groups of linear modules that share their inputs; each group's inputs are
known once the groups before it are compressed:

    qkv      x = input_layernorm(h)
    o        c = attention(x)
    gate_up  x = post_attention_layernorm(h + o(c))
    down     d = act(gate(x)) * up(x)

The attention and MLP code is transformers' own, with the closing projection (o_proj, down_proj) taken out: what
is left returns exactly the inputs of that projection, whatever the model does with rope, windows or QK norms.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from pifa_vllm.checkpoint import Checkpoint, Shards, check_finite, read_json
from pifa_vllm.checkpoint.densify import DenseShards
from pifa_vllm.errors import UnsupportedModelError

# Pre-norm decoder layers with the module names below. Checked against each model's own forward in the tests.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MODULES = tuple(module for group in GROUPS.values() for module in group)


@dataclass(frozen=True)
class LinearShape:
    """A compressible linear module: its full name, decoder layer, path within the layer, and [m, n]."""

    name: str
    layer: int
    module: str
    m: int
    n: int


class DenseModel:
    """A Hugging Face model directory, read by tensor name.

    Args:
        directory: config.json, tokenizer and safetensors shards.
        checkpoint: of the same directory, if that is a PIFA checkpoint: the model is then the dense one that it
            stands for.

    Raises:
        UnsupportedModelError: if its architecture is not one of `ARCHITECTURES`, or it is already quantised.
        CheckpointError: if a file or tensor is missing, damaged or of the wrong shape.
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint | None = None) -> None:
        self.directory = directory
        self.raw_config = read_json(directory / "config.json")
        if checkpoint is not None:
            del self.raw_config["quantization_config"]
        self._check_supported()
        self.shards = Shards(directory) if checkpoint is None else DenseShards(checkpoint)
        try:
            self.config: Any = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            self.config._attn_implementation = "sdpa"
            if checkpoint is not None:
                del self.config.quantization_config
            with torch.device("meta"):
                self._skeleton: Any = AutoModelForCausalLM.from_config(self.config)
        except Exception as error:  # transformers validates in many places, with as many kinds of error
            raise UnsupportedModelError(
                f"{directory / 'config.json'}: transformers cannot make a model of it ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]})."
            ) from error
        self._rotary = type(self._skeleton.model.rotary_emb)(self.config)
        self._check_shapes()

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the first layer's weights."""
        return self.shards.entry(layer_name(0, MODULES[0]) + ".weight").dtype

    def linears(self) -> list[LinearShape]:
        """List every compressible module in the order in which it is compressed."""
        found = []
        for layer in range(self.layers):
            for module in MODULES:
                name = layer_name(layer, module)
                m, n = self.shards.entry(f"{name}.weight").shape
                found.append(LinearShape(name, layer, module, m, n))
        return found

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token embeddings [..., hidden] without loading the whole table."""
        return self.shards.load_rows("model.embed_tokens.weight", tokens)

    def layer_twice(self, index: int, device: torch.device) -> tuple[StagedLayer, StagedLayer]:
        """Load one decoder layer in float32, to be run with its original and with other weights.

        Both share their memory: `StagedLayer.replace_weight` replaces, it does not overwrite.

        Raises:
            CheckpointError: if a tensor cannot be read or is not finite.
        """
        state = self._layer_state(index, device)
        return self._staged(index, state, device), self._staged(index, state, device)

    def staged_layer(self, index: int, device: torch.device) -> StagedLayer:
        """Load one decoder layer in float32.

        Raises:
            CheckpointError: if a tensor cannot be read or is not finite.
        """
        return self._staged(index, self._layer_state(index, device), device)

    def head(self, device: torch.device) -> tuple[nn.Module, Tensor]:
        """Load what follows the last layer, in float32: the norm, and the output matrix [vocabulary, hidden].

        Raises:
            CheckpointError: if a tensor cannot be read.
        """
        norm = copy.deepcopy(self._skeleton.model.norm)
        norm.load_state_dict({"weight": self.load_as("model.norm.weight", torch.float32)}, assign=True)
        tied = "lm_head.weight" not in self.shards
        matrix = self.load_as("model.embed_tokens.weight" if tied else "lm_head.weight", torch.float32)
        return norm.to(device).requires_grad_(False), matrix.to(device)

    def _layer_state(self, index: int, device: torch.device) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}."
        state = {}
        for name in self._skeleton.model.layers[index].state_dict():
            tensor = self.shards.load(prefix + name)
            check_finite(tensor, f"{self.shards.entry(prefix + name).file}: tensor {prefix}{name}")
            state[name] = tensor.to(device, torch.float32)
        return state

    def load_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """Load a tensor that is not compressed, rounded to a storage dtype.

        Raises:
            CheckpointError: if it cannot be read, or does not fit the dtype.
        """
        tensor = self.shards.load(name).to(dtype)
        check_finite(tensor, f"{self.shards.entry(name).file}: tensor {name} in {dtype}")
        return tensor

    def norm_tensors(self, layer: int) -> list[str]:
        """Names of a decoder layer's tensors that belong to no linear module."""
        prefix = f"model.layers.{layer}."
        linear = tuple(f"{layer_name(layer, module)}." for module in MODULES)
        return [x for x in self.shards.entries if x.startswith(prefix) and not x.startswith(linear)]

    def untouched_tensors(self) -> list[str]:
        """Names of the tensors outside the decoder layers, which are not compressed."""
        return [name for name in self.shards.entries if not name.startswith("model.layers.")]

    def check_finite(self) -> None:
        """Read every weight once, so that a NaN is found before hours of work and not in the middle.

        Raises:
            CheckpointError: naming the file and tensor.
        """
        for name, entry in self.shards.entries.items():
            check_finite(self.shards.load(name), f"{entry.file}: tensor {name}")

    def _staged(self, index: int, state: dict[str, Tensor], device: torch.device) -> StagedLayer:
        with torch.device("meta"):
            module = type(self._skeleton.model.layers[index])(self.config, index)
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        module.eval()
        return StagedLayer(module, self._rotary.to(device), self._window(module))

    def _window(self, module: Any) -> int | None:
        attention = module.self_attn
        if hasattr(attention, "sliding_window"):
            window = attention.sliding_window
        else:
            window = self.config.sliding_window if self.config.model_type == "mistral" else None
        return int(window) if window is not None else None

    def _check_supported(self) -> None:
        path = self.directory / "config.json"
        architectures = self.raw_config.get("architectures") or ["none"]
        if architectures[0] not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: architectures: expected one of {', '.join(ARCHITECTURES)} (SmolLM is a "
                f"LlamaForCausalLM), found {architectures[0]}."
            )
        quantization = self.raw_config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedModelError(
                f"{path}: quantization_config: expected a dense model, found one quantised by {method!r}. "
                "Compress the original weights."
            )

    def _check_shapes(self) -> None:
        """Compare every tensor that the architecture asks for with the shards' headers."""
        tied = set(getattr(self._skeleton, "_tied_weights_keys", None) or ())
        for name, parameter in self._skeleton.state_dict().items():
            if name in tied and self.config.tie_word_embeddings and name not in self.shards:
                continue
            entry = self.shards.entry(name)
            if entry.shape != tuple(parameter.shape) or not entry.is_float:
                raise UnsupportedModelError(
                    f"{entry.file}: tensor {name}: expected floating {list(parameter.shape)} as config.json says, "
                    f"found {entry.dtype} {list(entry.shape)}."
                )


class StagedLayer:
    """One decoder layer whose stages can be run apart.

    Args:
        module: transformers' decoder layer with weights loaded.
        rotary: the model's rotary embedding.
        window: the attention's sliding window in tokens, None for full attention.
    """

    def __init__(self, module: Any, rotary: Any, window: int | None) -> None:
        self._module = module
        self._rotary = rotary
        self._window = window
        self._config = module.self_attn.config
        self.linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in MODULES}
        module.self_attn.o_proj = nn.Identity()
        module.mlp.down_proj = nn.Identity()

    def replace_weight(self, name: str, weight: Tensor) -> None:
        """Run `name` with another weight [m, n] from now on; the bias stays."""
        self.linears[name].weight = nn.Parameter(weight, requires_grad=False)

    def attention_input(self, hidden: Tensor) -> Tensor:
        """Inputs of q, k, v: [samples, length, hidden]."""
        return self._module.input_layernorm(hidden)  # type: ignore[no-any-return]  # transformers is not followed

    def attention(self, hidden: Tensor) -> Tensor:
        """Inputs of o from the layer's inputs: [samples, length, heads · head size]."""
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).unsqueeze(0)
        mask = create_causal_mask if self._window is None else create_sliding_window_causal_mask
        arguments = {
            "config": self._config,
            "inputs_embeds": hidden,
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions,
        }
        output, _ = self._module.self_attn(
            hidden_states=self.attention_input(hidden),
            position_embeddings=self._rotary(hidden, positions),
            attention_mask=mask(**arguments),
        )
        return output  # type: ignore[no-any-return]  # transformers is not followed

    def attention_output(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Hidden states after the attention block: h + o(c)."""
        return hidden + self.linears["self_attn.o_proj"](context)  # type: ignore[no-any-return]  # see above

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """Inputs of gate and up from the hidden states after the attention block."""
        return self._module.post_attention_layernorm(hidden)  # type: ignore[no-any-return]  # see above

    def mlp(self, hidden: Tensor) -> Tensor:
        """Inputs of down from the hidden states after the attention block: [samples, length, intermediate]."""
        return self._module.mlp(self.mlp_input(hidden))  # type: ignore[no-any-return]  # see above

    def mlp_output(self, hidden: Tensor, activation: Tensor) -> Tensor:
        """Hidden states that leave the layer: h + down(d)."""
        return hidden + self.linears["mlp.down_proj"](activation)  # type: ignore[no-any-return]  # see above


def layer_name(layer: int, module: str) -> str:
    """Full name of a module of a decoder layer, as checkpoints spell it."""
    return f"model.layers.{layer}.{module}"
