"""What a checkpoint consists of, as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pifa_vllm.checkpoint.shards import Shards, TensorEntry
from pifa_vllm.checkpoint.validate import Checkpoint, ModuleEntry

# The weights of decoder layers: what a compressor may compress, and what densities are measured over.
_LAYER_WEIGHT = re.compile(r"(?:^|\.)layers\.\d+\..*\.weight$")


@dataclass(frozen=True)
class ModuleSummary:
    """One linear module of a decoder layer.

    Attributes:
        rank: None where the module is dense.
        parameters: kept numbers, without indices and bias.
        nbytes: of the kept numbers and, where compressed, the indices.
        dense_nbytes: of the dense matrix in the same dtype, or where that is quantized in the embedding's.
        max_coefficient: max |C|, 0 where there is no C.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    parameters: int
    nbytes: int
    dense_nbytes: int
    dtype: str
    bias: bool
    max_coefficient: float

    @property
    def kind(self) -> str:
        """The last part of the name, such as q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def dense_parameters(self) -> int:
        """m · n."""
        return self.out_features * self.in_features

    @property
    def density(self) -> float:
        """Kept / dense parameters."""
        return self.parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes and the density, ready for JSON."""
        return {**asdict(self), "density": self.density}


def summarize(checkpoint: Checkpoint) -> list[ModuleSummary]:
    """Describe every linear module of the decoder layers, compressed or dense, in the order of the layers.

    Raises:
        CheckpointError: if a coefficient is not finite.
    """
    modules = [_compressed(checkpoint, entry) for entry in checkpoint.modules.values()]
    modules += [_dense(checkpoint, *found) for found in dense_weights(checkpoint.shards)]
    return sorted(modules, key=lambda module: _natural(module.name))


def dense_weights(shards: Shards) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors [m, n] of the decoder layers' linear modules that are dense, with their full names."""
    for name, entry in shards.entries.items():
        if len(entry.shape) == 2 and _LAYER_WEIGHT.search(name):
            yield name, entry


def _compressed(checkpoint: Checkpoint, entry: ModuleEntry) -> ModuleSummary:
    factors, dtype = checkpoint.config.factors, _name(entry.dtype)
    if factors is not None:
        dtype = f"{_name(factors.dtype)}/{_name(factors.coefficient_dtype)}"
    return ModuleSummary(
        name=entry.name,
        out_features=entry.m,
        in_features=entry.n,
        rank=entry.rank,
        parameters=entry.parameters,
        nbytes=entry.nbytes,
        dense_nbytes=entry.m * entry.n * (checkpoint.dtype if factors else entry.dtype).itemsize,
        dtype=dtype,
        bias=entry.has_bias,
        max_coefficient=checkpoint.load(entry.name).max_coefficient,
    )


def _dense(checkpoint: Checkpoint, name: str, entry: TensorEntry) -> ModuleSummary:
    module, scale = name.removesuffix(".weight"), f"{name}_scale"
    quantized = scale in checkpoint.shards
    m, n = checkpoint.linear[module] if quantized else entry.shape
    return ModuleSummary(
        name=module,
        out_features=m,
        in_features=n,
        rank=None,
        parameters=m * n,
        nbytes=entry.nbytes + (checkpoint.shards.entry(scale).nbytes if quantized else 0),
        dense_nbytes=m * n * checkpoint.dtype.itemsize if quantized else entry.nbytes,
        dtype=_name(entry.dtype),
        bias=f"{module}.bias" in checkpoint.shards,
        max_coefficient=0.0,
    )


def _name(dtype: torch.dtype) -> str:
    return "int4" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
