"""Random LLaMA-shaped checkpoints for the end-to-end benchmark: dense, PIFA, quantized, or as large as low rank.

Serving speed depends on shapes and dtypes, not on what the weights say, so nothing has to be downloaded or
compressed. One decoder layer is in memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pifa_vllm.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    FactorFormat,
    PIFAConfig,
    Shards,
    is_pifa,
    read_json,
)
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.checkpoint.schema import PIVOT_COLUMNS
from pifa_vllm.checkpoint.writer import module_tensors
from pifa_vllm.compression.allocation import allocate, kept_parameters, uniform
from pifa_vllm.compression.decoder import LinearShape
from pifa_vllm.compression.options import FACTORS
from pifa_vllm.errors import CheckpointError
from pifa_vllm.factorization import PIFA, lowrank_parameters
from pifa_vllm.quantization import QuantizedPIFA, round_to_nearest

Form = Literal["dense", "dense-int8", "pifa", "pifa-int8", "pifa-int4", "lowrank"]
FORMS: tuple[Form, ...] = get_args(Form)
# vLLM's own integers: weights by output, activations by token.
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}

_TILE = 16


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a `LlamaForCausalLM`, named as in its config.json."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    max_position_embeddings: int = 2048

    @property
    def linears(self) -> list[LinearShape]:
        """Every linear module of the decoder layers, in the order of the layers."""
        hidden, inner = self.hidden_size, self.intermediate_size
        key_value = hidden // self.num_attention_heads * self.num_key_value_heads
        modules = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        return [
            LinearShape(f"model.layers.{layer}.{module}", layer, module, m, n)
            for layer in range(self.num_hidden_layers)
            for module, (m, n) in modules.items()
        ]


# TinyLlama's sizes: 1.1 billion parameters.
SHAPES = {
    "1b": ModelShape("1b", 2048, 5632, 22, 32, 4),
    "tiny": ModelShape("tiny", 128, 176, 2, 4, 2, vocab_size=512),
}


def ranks_of(shape: ModelShape, form: Form, density: float) -> dict[str, int]:
    """Return the rank of each compressed module; none for the dense form.

    "lowrank" stands for plain low rank of the rank that PIFA has at this density. vLLM has no layer of two plain
    factors, so it is a PIFA checkpoint with as many numbers, r(m + n), that is of a higher rank.
    """
    if form.startswith("dense"):
        return {}
    ranks = allocate(shape.linears, uniform(density), "pifa", _TILE)
    if form != "lowrank":
        return ranks

    def density_of(x: LinearShape) -> float:
        return lowrank_parameters(x.m, x.n, ranks[x.name]) / (x.m * x.n) if x.name in ranks else 1.0

    return allocate(shape.linears, density_of, "pifa", _TILE)


def save_random_model(
    directory: Path, shape: ModelShape, form: Form, density: float, dtype: torch.dtype, seed: int = 0
) -> None:
    """Write a checkpoint of random weights, with a tokenizer that knows one word per token.

    Args:
        directory: to create; appears whole or not at all.
        shape: of the model.
        form: see `ranks_of`.
        density: kept / dense parameters of the linear modules; ignored by the dense form.
        dtype: of the weights.
        seed: of the weights.

    Raises:
        CheckpointError: if it exists or cannot be written.
    """
    if directory.exists():
        raise CheckpointError(f"{directory}: exists; expected a directory to create.")
    generator = torch.Generator().manual_seed(seed)
    ranks = ranks_of(shape, form, density)
    kind = FACTORS[form.removeprefix("pifa-")] if form in ("pifa-int8", "pifa-int4") else None
    scratch = [directory.with_name(f"{directory.name}.{name}") for name in ("whole", "staging")]
    for path in scratch:
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
    writer = CheckpointWriter(*scratch)

    def normal(m: int, n: int) -> Tensor:
        return torch.randn(m, n, generator=generator).mul_(n**-0.5).to(dtype)

    hidden = shape.hidden_size
    ones = torch.ones(hidden, dtype=dtype)
    for layer in range(shape.num_hidden_layers):
        tensors = {
            f"model.layers.{layer}.input_layernorm.weight": ones,
            f"model.layers.{layer}.post_attention_layernorm.weight": ones.clone(),
        }
        for linear in shape.linears:
            if linear.layer != layer:
                continue
            if linear.name in ranks:
                columns = kind is not None and kind.pivots(linear.name) == PIVOT_COLUMNS
                # Columns are the rows of the transposed matrix.
                sizes = (linear.n, linear.m) if columns else (linear.m, linear.n)
                factors = _random_factors(*sizes, ranks[linear.name], generator)
                stored = factors if kind is None else _quantized(factors, kind, columns=columns)
                tensors |= module_tensors(linear.name, stored, None, dtype)
                continue
            weight = normal(linear.m, linear.n)
            if kind is not None:
                rounded = round_to_nearest(weight.float(), kind.dtype, kind.group)
                scale = rounded.scale
            elif form == "dense-int8":
                rounded = round_to_nearest(weight.float(), torch.int8, 0)
                scale = rounded.scale.to(dtype)
            else:
                tensors[f"{linear.name}.weight"] = weight
                continue
            tensors |= {f"{linear.name}.weight": rounded.numbers, f"{linear.name}.weight_scale": scale}
        writer.write_shard(f"model-layer-{layer:03d}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": torch.randn(shape.vocab_size, hidden, generator=generator).to(dtype),
        "model.norm.weight": ones,
        "lm_head.weight": normal(shape.vocab_size, hidden),
    }
    writer.write_shard("model-ends.safetensors", ends)
    _tokenizer(shape.vocab_size).save_pretrained(writer.staging)
    kept = kept_parameters(shape.linears, ranks, "pifa") / sum(x.m * x.n for x in shape.linears)
    section = None
    if ranks:
        version: Literal[1, 2] = 1 if kind is None else 2
        provenance = {"weights": "random"}
        section = PIFAConfig(
            format_version=version, density=kept, ranks=ranks, factors=kind, provenance=provenance
        )
    writer.publish(_config(shape, dtype), section)
    if form == "dense-int8":
        config = read_json(writer.output / "config.json") | {"quantization_config": W8A8}
        replace_text(writer.output / "config.json", json.dumps(config, indent=2) + "\n")
    writer.output.rename(directory)


def weight_bytes(directory: Path, dtype: torch.dtype) -> dict[str, int]:
    """Count a checkpoint's weights in the dtype that they are served in.

    Returns:
        "linear": bytes of the decoder layers' linear modules, biases and pivot rows included; "total": of all
        tensors; "dense_linear": what the same modules take as dense matrices.
    """
    counts = {"linear": 0, "total": 0, "dense_linear": 0}
    entries = Shards(directory).entries
    matrices = [entry.shape for name, entry in entries.items() if name.endswith("_proj.weight")]
    if is_pifa(directory):
        matrices = list(Checkpoint.open(directory).linear.values())
    for name, entry in entries.items():
        nbytes = entry.served_nbytes(dtype)
        counts["total"] += nbytes
        if "_proj." in name:
            counts["linear"] += nbytes
            counts["dense_linear"] += nbytes if name.endswith(".bias") else 0
    counts["dense_linear"] += sum(math.prod(shape) for shape in matrices) * dtype.itemsize
    return counts


def _random_factors(m: int, n: int, rank: int, generator: torch.Generator) -> PIFA:
    # Coefficients of variance 1/r give all rows of W the same scale, as dense random weights have.
    bound = (3.0 / rank) ** 0.5
    return PIFA(
        torch.randn(rank, n, generator=generator) * n**-0.5,
        (torch.rand(m - rank, rank, generator=generator) * 2.0 - 1.0) * bound,
        torch.randperm(m, generator=generator)[:rank].sort().values.to(torch.int32),
    )


def _quantized(factors: PIFA, kind: FactorFormat, *, columns: bool) -> QuantizedPIFA:
    """Rounded to nearest; with `columns` the factors are of the transposed matrix."""
    weight, rest = factors.pivot_weight, factors.coefficients
    if columns:
        weight, rest = weight.T.contiguous(), rest.T.contiguous()
    return QuantizedPIFA(
        round_to_nearest(weight, kind.dtype, kind.group),
        round_to_nearest(rest, kind.coefficient_dtype, kind.group),
        factors.pivot_rows,
        columns,
    )


def _config(shape: ModelShape, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    ).to_dict()
    return config


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
