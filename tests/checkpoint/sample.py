"""A checkpoint made by hand: one layer with three compressed matrices, one with a bias, in two shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pifa_vllm.checkpoint import CheckpointWriter, FactorFormat, PIFAConfig
from pifa_vllm.checkpoint.shards import INDEX_NAME
from pifa_vllm.checkpoint.writer import module_tensors
from pifa_vllm.factorization import PIFA, factorize
from pifa_vllm.quantization import round_to_nearest
from tests.pifa_tiny import quantized

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 7,
    "hidden_size": 5,
    "intermediate_size": 9,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _module(name: str, m: int, n: int, rank: int, bias: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(m * n + rank)
    u, v = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return module_tensors(name, factorize(u, v), torch.ones(m) if bias else None, torch.float32)


def _shards() -> list[dict[str, Tensor]]:
    dense = {
        "self_attn.k_proj": (2, 5),
        "self_attn.v_proj": (2, 5),
        "self_attn.o_proj": (5, 6),
        "mlp.gate_proj": (9, 5),
        "input_layernorm": (5,),
        "post_attention_layernorm": (5,),
    }
    return [
        _module(f"{LAYER}.self_attn.q_proj", 6, 5, 3)
        | {"model.norm.weight": torch.ones(5), "model.embed_tokens.weight": torch.ones(7, 5)},
        _module(f"{LAYER}.mlp.up_proj", 9, 5, 2, bias=True)
        | _module(f"{LAYER}.mlp.down_proj", 5, 9, 4)
        | {f"{LAYER}.{name}.weight": torch.ones(shape) for name, shape in dense.items()},
    ]


@dataclass
class Sample:
    """The parts of a checkpoint; a test spoils one and writes it."""

    shards: list[dict[str, Tensor]] = field(default_factory=_shards)
    section: dict[str, Any] = field(
        default_factory=lambda: {
            "quant_method": "pifa",
            "format_version": 1,
            "density": 0.7,
            "ranks": {
                f"{LAYER}.self_attn.q_proj": 3,
                f"{LAYER}.mlp.up_proj": 2,
                f"{LAYER}.mlp.down_proj": 4,
            },
            "provenance": {"source": "by hand"},
        }
    )

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor in whichever shard has it, or add it to the first one."""
        shard = next((s for s in self.shards if name in s), self.shards[0])
        shard[name] = tensor.contiguous()

    def drop(self, name: str) -> None:
        for shard in self.shards:
            shard.pop(name, None)

    def get(self, name: str) -> Tensor:
        return next(s[name] for s in self.shards if name in s)

    def write(self, directory: Path) -> Path:
        """Write whatever the parts are by now, without any check."""
        directory.mkdir()
        weight_map = {}
        for file, tensors in zip(SHARDS, self.shards, strict=True):
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        config = CONFIG | {"quantization_config": self.section}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def publish(self, output: Path, staging: Path) -> None:
        """Write the parts as the compressor does."""
        writer = CheckpointWriter(output, staging)
        for file, tensors in zip(SHARDS, self.shards, strict=True):
            writer.write_shard(file, tensors)
        writer.write_text("README.md", "A model card.")
        writer.publish(dict(CONFIG), PIFAConfig.parse(self.section, "sample"))


def quantized_sample(
    bits: int = 4, coefficient_bits: int = 8, kind: str = "int", *, columns: bool = False
) -> Sample:
    """The same with every linear module quantized, in groups of 32, and gate and up with pivot columns or rows."""
    sample = Sample()
    factors = FactorFormat.model_validate(
        {
            "bits": bits,
            "coefficient_bits": coefficient_bits,
            "type": kind,
            "group_size": 32,
            "pivot_columns": ["gate_proj", "up_proj"] if columns else [],
        }
    )
    sample.section |= {"format_version": 2, "factors": factors.model_dump()}
    for shard in sample.shards:
        for name in [x.removesuffix(".pivot_rows") for x in shard if x.endswith(".pivot_rows")]:
            whole = PIFA(*(shard[f"{name}.{x}"] for x in ("pivot_weight", "coefficients", "pivot_rows")))
            del shard[f"{name}.pivot_rows"]
            stored = quantized(whole, factors, factors.pivots(name))
            shard |= module_tensors(name, stored, None, torch.float32)
        for name in [x for x in shard if x.endswith("_proj.weight")]:
            found = round_to_nearest(shard[name], factors.dtype, 32)
            shard |= {name: found.numbers, f"{name}_scale": found.scale}
    return sample
