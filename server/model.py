"""The model that is served: its weights, read from the checkpoint's headers, and what vLLM made of them."""

from __future__ import annotations

import platform
import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pifa_vllm import __version__
from pifa_vllm.checkpoint import Checkpoint, PIFAConfig, Shards, is_pifa
from pifa_vllm.errors import CheckpointError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights in the dtype they are served in.

    Attributes:
        config: the PIFA section, None if the model is dense.
        modules: the linear modules of the decoder layers, as /pifa/info lists them; `rank` is None if dense.
        compressed_bytes: of all tensors as they are, indices included.
        dense_bytes: of the dense model's tensors.
    """

    config: PIFAConfig | None
    modules: list[dict[str, Any]]
    compressed_bytes: int
    dense_bytes: int

    @property
    def density(self) -> float:
        """What the checkpoint says; 1 if dense."""
        return 1.0 if self.config is None else self.config.density

    def modules_by_kind(self) -> Counter[tuple[str, str]]:
        """Count (kind, "compressed" or "dense")."""
        return Counter((m["kind"], "dense" if m["rank"] is None else "compressed") for m in self.modules)


def read_weights(directory: Path, dtype: torch.dtype) -> Weights:
    """Read the headers of a model directory.

    Args:
        directory: PIFA or dense, in safetensors.
        dtype: that it is served in; integers stay what they are.

    Raises:
        CheckpointError: if there are no safetensors, or they are not what config.json says.
    """
    checkpoint = Checkpoint.open(directory) if is_pifa(directory) else None
    shards = Shards(directory) if checkpoint is None else checkpoint.shards
    compressed = {} if checkpoint is None else checkpoint.modules
    modules = [_module(e.name, e.m, e.n, e.rank, e.parameters) for e in compressed.values()]
    linear = {} if checkpoint is None else checkpoint.linear
    nbytes = stored = 0
    for name, entry in shards.entries.items():
        served = entry.served_nbytes(dtype)
        nbytes += served
        module, _, suffix = name.rpartition(".")
        stored += served if module in linear and suffix != "bias" else 0
        if suffix == "weight" and len(entry.shape) == 2 and _LAYER.search(name):
            m, n = linear.get(module, entry.shape)
            modules.append(_module(module, m, n, None, m * n))
    dense = sum(m * n for m, n in linear.values()) * dtype.itemsize
    return Weights(
        config=None if checkpoint is None else checkpoint.config,
        modules=sorted(modules, key=lambda m: (m["layer"], m["name"])),
        compressed_bytes=nbytes,
        dense_bytes=nbytes - stored + dense,
    )


def _module(name: str, m: int, n: int, rank: int | None, parameters: int) -> dict[str, Any]:
    found = _LAYER.search(name)
    return {
        "name": name,
        "kind": name.rpartition(".")[2],
        "layer": int(found[1]) if found else 0,
        "shape": [m, n],
        "rank": rank,
        "parameters": parameters,
        "density": parameters / (m * n),
    }


@dataclass(frozen=True)
class ModelFacts:
    """What does not change while the server runs.

    Attributes:
        name: as clients call it.
        weights: None where the model is not a directory of safetensors on this machine.
        engines: data-parallel replicas of the model.
        kv_cache_bytes: over all engines and ranks.
        kv_cache_tokens: that fit into it.
        versions: of the packages that matter.
    """

    name: str
    quantization: str
    backend: str
    dtype: str
    max_model_len: int
    weights: Weights | None
    engines: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    versions: dict[str, str]

    @property
    def kv_gained_bytes(self) -> int:
        """Bytes that the compression leaves to the KV caches of all engines."""
        if self.weights is None:
            return 0
        return self.engines * (self.weights.dense_bytes - self.weights.compressed_bytes)

    @property
    def kv_gained_tokens(self) -> int:
        """Tokens that fit into them."""
        if not self.kv_cache_bytes:
            return 0
        return self.kv_gained_bytes * self.kv_cache_tokens // self.kv_cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """Describe the model for /pifa/info, ready for JSON."""
        weights: dict[str, Any] = {}
        if self.weights is not None:
            config = self.weights.config
            weights = {
                "density": self.weights.density,
                "compressed_bytes": self.weights.compressed_bytes,
                "dense_bytes": self.weights.dense_bytes,
                "modules": self.weights.modules,
                "provenance": {} if config is None else config.provenance,
            }
        return {
            "model": self.name,
            "quantization": self.quantization,
            "dtype": self.dtype,
            "backend": self.backend,
            "max_model_len": self.max_model_len,
            **weights,
            "kv_cache": {
                "bytes": self.kv_cache_bytes,
                "tokens": self.kv_cache_tokens,
                "gained_bytes": self.kv_gained_bytes,
                "gained_tokens": self.kv_gained_tokens,
            },
            "versions": self.versions,
        }


def gather(config: VllmConfig, workers: list[dict[str, Any]]) -> ModelFacts:
    """Put the facts together.

    Args:
        config: vLLM's, of a running engine.
        workers: from `PIFAWorkerExtension.pifa_memory` of every rank; none where the class is not mixed in.
    """
    model = config.model_config
    try:
        weights = read_weights(Path(model.model), model.dtype)
    except CheckpointError:
        weights = None  # GGUF, pickles, a name on a hub: served all the same
    names = model.served_model_name
    engines = len({worker["engine"] for worker in workers}) or 1
    return ModelFacts(
        name=names if isinstance(names, str) else names[0],
        quantization=str(model.quantization or "none"),
        backend=workers[0]["backend"] if workers else "unknown",
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_model_len,
        weights=weights,
        engines=engines,
        kv_cache_bytes=sum(worker["kv_cache"] for worker in workers),
        # vLLM gives all engines as many.
        kv_cache_tokens=(config.cache_config.kv_cache_size_tokens or 0) * engines,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """The versions that decide what is computed."""
    import vllm

    return {
        "version": __version__,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
