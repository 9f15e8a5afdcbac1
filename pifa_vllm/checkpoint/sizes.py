"""The sizes that config.json claims, held against the shards' headers.

transformers and vLLM build a model from config.json before they look at its tensors. Everything whose size they
take from there is therefore bounded here by numbers that the shards really hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from pifa_vllm.checkpoint.files import quoted
from pifa_vllm.checkpoint.schema import WEIGHT_SCALE, FactorFormat
from pifa_vllm.checkpoint.shards import TensorEntry
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.quantization import groups, row_width

# model_type to what the names of its classes begin with.
FAMILIES: Final = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# Known models have an eighth of these layers, and this context with their rope scaling multiplied in: vLLM keeps
# a table of so many positions. The other sizes only have to be numbers that a tensor's shape can have.
_MAX_LAYERS: Final = 1024
_MAX_POSITIONS: Final = 1 << 24
_MAX_SIZE: Final = (1 << 31) - 1

# What makes a loader read another config, or another model, than the one that is checked here.
_MISLEADING: Final = (
    "auto_map",
    "compression_config",
    "configuration_files",
    "decoder",
    "encoder",
    "generator",
    "speculators_config",
    "text_config",
    "text_encoder",
    "thinker_config",
)
_LAYER: Final = re.compile(r"(?:model\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """What a decoder's shapes follow from."""

    model: str
    qk_norm: bool
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def shapes(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield the name and shape [out, in] of every tensor but biases and a head, as in the dense model.

        And the fields of config.json that the shape follows from.
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        of_q, of_kv = (f"num_{kind}_heads, head_dim and hidden_size" for kind in ("attention", "key_value"))
        of_mlp = "hidden_size and intermediate_size"
        yield f"{prefix}embed_tokens.weight", (self.vocab, self.hidden), "vocab_size and hidden_size"
        yield f"{prefix}norm.weight", (self.hidden,), "hidden_size"
        for layer in range(self.layers):
            at = f"{prefix}layers.{layer}."
            yield f"{at}input_layernorm.weight", (self.hidden,), "hidden_size"
            yield f"{at}post_attention_layernorm.weight", (self.hidden,), "hidden_size"
            yield f"{at}self_attn.q_proj.weight", (q, self.hidden), of_q
            yield f"{at}self_attn.k_proj.weight", (kv, self.hidden), of_kv
            yield f"{at}self_attn.v_proj.weight", (kv, self.hidden), of_kv
            yield f"{at}self_attn.o_proj.weight", (self.hidden, q), of_q
            yield f"{at}mlp.gate_proj.weight", (self.intermediate, self.hidden), of_mlp
            yield f"{at}mlp.up_proj.weight", (self.intermediate, self.hidden), of_mlp
            yield f"{at}mlp.down_proj.weight", (self.hidden, self.intermediate), of_mlp
            if self.qk_norm:
                yield f"{at}self_attn.q_norm.weight", (self.head_dim,), "head_dim"
                yield f"{at}self_attn.k_norm.weight", (self.head_dim,), "head_dim"


def read_sizes(config: Mapping[str, Any], source: str) -> Sizes:
    """Take a decoder's sizes from its config.json, as transformers and vLLM would.

    Args:
        config: the decoded file.
        source: to name in errors.

    Raises:
        CheckpointError: naming the field, expected and found.
        UnsupportedModelError: if it is another kind of model than those that can be compressed.
    """
    for key in _MISLEADING:
        if config.get(key) is not None:
            raise CheckpointError(
                f"{source}: {key}: expected none in a PIFA checkpoint, which is described by config.json alone and "
                f"runs no code of its own, found {quoted(config[key])}."
            )
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"{source}: model_type: expected one of {', '.join(FAMILIES)}, found {quoted(kind)}."
        )
    names = config.get("architectures") or [f"{family}ForCausalLM"]
    # The second one is the base model saved by itself.
    if names not in ([f"{family}ForCausalLM"], [f"{family}Model"]):
        raise CheckpointError(
            f"{source}: architectures: expected {family}ForCausalLM for the model_type {kind}, "
            f"found {quoted(names)}."
        )

    def size(field: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        value = config.get(field)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{source}: {field}: expected a number from 1 to {most}, found {quoted(value)}."
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    sizes = Sizes(
        model=names[0],
        qk_norm=family == "Qwen3",
        vocab=size("vocab_size"),
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers", most=_MAX_LAYERS),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        # transformers' default for Qwen3, whose heads need not fill the hidden size.
        head_dim=size("head_dim", 128 if family == "Qwen3" else max(1, hidden // heads)),
    )
    _check_positions(config, size("max_position_embeddings", 1, most=_MAX_POSITIONS), source)
    return sizes


def linear_shapes(sizes: Sizes, tensors: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the shape [m, n] of every linear module of the decoder, by its name among these tensors' names."""
    shapes = sizes.shapes(_prefix(tensors))
    return {
        name.removesuffix(".weight"): (x[0], x[1]) for name, x, _ in shapes if name.endswith("_proj.weight")
    }


def check_sizes(
    sizes: Sizes,
    directory: Path,
    tensors: Mapping[str, TensorEntry],
    full: Mapping[str, tuple[int, int]],
    factors: FactorFormat | None = None,
) -> None:
    """Hold sizes against the tensors that there are, without reading them.

    Args:
        sizes: of config.json.
        directory: to name in errors.
        tensors: name to entry, of all shards.
        full: compressed module to the shape [m, n] that its factors make.
        factors: how linear modules are quantized, if they are.

    Raises:
        CheckpointError: naming the first tensor that is missing, has another shape, or holds no weights.
    """
    shapes = list(sizes.shapes(_prefix(tensors)))
    linear = linear_shapes(sizes, tensors)
    if unknown := sorted(full.keys() - linear.keys()):
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config.ranks names {unknown[0]}, expected a linear layer "
            f"of {sizes.model} with a num_hidden_layers of {sizes.layers}, found no such module."
        )
    found = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    if len(found) != sizes.layers or max(found) != sizes.layers - 1:
        raise CheckpointError(
            f"{directory / 'config.json'}: num_hidden_layers: expected the layers that the shards hold tensors of, "
            f"{len(found)} with {max(found, default=0)} as the last number, found {sizes.layers}."
        )
    if "lm_head.weight" in tensors:
        shapes.append(("lm_head.weight", (sizes.vocab, sizes.hidden), "vocab_size and hidden_size"))
    for name, shape, fields in shapes:
        module = name.removesuffix(".weight")
        if module in full:
            if full[module] != shape:
                raise CheckpointError(
                    f"{tensors[f'{module}.pivot_weight'].file}: module {module}: {sizes.model} expects "
                    f"[out, in] {list(shape)} by {fields} in config.json, the factors make "
                    f"{list(full[module])}."
                )
            continue
        if factors is not None and module in linear:
            check_quantized(
                tensors, directory, name, f"{module}.{WEIGHT_SCALE}", linear[module], factors.dtype, factors
            )
            continue
        entry = tensors.get(name)
        if entry is None:
            raise CheckpointError(
                f"{directory}: tensor {name} is missing; {sizes.model} expects it with shape {list(shape)}."
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name}: {sizes.model} expects {list(shape)} by {fields} in config.json, "
                f"found {list(entry.shape)}."
            )
        if not entry.is_float:
            raise CheckpointError(
                f"{entry.file}: tensor {name}: expected a floating dtype, found {entry.dtype}."
            )


def check_quantized(
    tensors: Mapping[str, TensorEntry],
    directory: Path,
    numbers: str,
    scale: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    factors: FactorFormat,
) -> None:
    """Hold the two tensors of a quantized matrix [rows, k] against its shape.

    Args:
        tensors: name to entry, of all shards.
        directory: to name in errors.
        numbers: name of the one.
        scale: name of the other.
        shape: rows and k.
        dtype: of the numbers.
        factors: whose size of groups counts.

    Raises:
        CheckpointError: naming the one that is missing, or has another shape or dtype.
    """
    rows, k = shape
    for name, width, kind in (
        (numbers, row_width(k, dtype), dtype),
        (scale, groups(k, factors.group), torch.float16),
    ):
        entry = tensors.get(name)
        if entry is None or entry.shape != (rows, width) or entry.dtype != kind:
            found = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(
                f"{directory if entry is None else entry.file}: tensor {name}: expected {kind} [{rows}, {width}] "
                f"by config.json's sizes and quantization_config.factors, found {found}."
            )


def _prefix(tensors: Iterable[str]) -> str:
    # The base model saved by itself leaves it out.
    return "model." if any(name.startswith("model.") for name in tensors) else ""


def _check_positions(config: Mapping[str, Any], positions: int, source: str) -> None:
    """Bound the context, rope scaling included, for which tables are made that no tensor vouches for."""
    for field in ("rope_parameters", "rope_scaling"):
        section = config.get(field)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise CheckpointError(f"{source}: {field}: expected an object, found {quoted(section)}.")
        nested = [value for value in section.values() if isinstance(value, dict)]
        for parameters in (section, *nested):
            factor = parameters.get("factor") or 1
            original = parameters.get("original_max_position_embeddings") or 1
            for key, value in (("factor", factor), ("original_max_position_embeddings", original)):
                if type(value) not in (int, float) or not 0 < value <= _MAX_POSITIONS:
                    raise CheckpointError(
                        f"{source}: {field}.{key}: expected a number up to {_MAX_POSITIONS}, found {quoted(value)}."
                    )
            if max(positions, original) * factor > _MAX_POSITIONS:
                raise CheckpointError(
                    f"{source}: {field}: expected a context of at most {_MAX_POSITIONS} positions, found "
                    f"{max(positions, original)} scaled by {factor}."
                )
