"""What only the worker processes know. vLLM mixes this class into its workers (`--worker-extension-cls`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from pifa_vllm_server.memory import main_memory
from torch import Tensor


class PIFAWorkerExtension:
    """Methods that `collective_rpc` calls by name, on every rank."""

    def pifa_memory(self) -> dict[str, Any]:
        """Describe this rank's memory.

        Returns:
            engine, rank, pid, backend (of the linear layers) and, in bytes: total (the device's memory; on a CPU
            the machine's or the container's), weights, kv_cache, and other (in use beyond those two, by whatever
            process, the other ranks on the same device included).
        """
        device: torch.device = self.device  # type: ignore[attr-defined]  # a worker's
        weights = {s.data_ptr(): s for s in _storages(self._pifa_weights())}
        cache = {s.data_ptr(): s for s in _storages(self._pifa_kv_cache())}
        weight_bytes = sum(s.nbytes() for s in weights.values())
        cache_bytes = sum(s.nbytes() for s in cache.values())
        if device.type == "cpu":
            # vLLM fills the cache with zeros, so all of it is resident.
            memory = main_memory()
            total, used = memory.total, memory.used
        else:
            free, total = torch.accelerator.get_memory_info(device)
            used = total - free
        return {
            "engine": self.parallel_config.data_parallel_index,  # type: ignore[attr-defined]  # a worker's
            "rank": self.rank,  # type: ignore[attr-defined]  # a worker's
            "pid": os.getpid(),
            "backend": linear_backend(device),
            "total": total,
            "weights": weight_bytes,
            "kv_cache": cache_bytes,
            "other": max(0, used - weight_bytes - cache_bytes),
        }

    def _pifa_weights(self) -> Iterator[Tensor]:
        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]  # a worker's
        yield from model.parameters()
        yield from model.buffers()
        if self.speculative_config is not None:  # type: ignore[attr-defined]  # a worker's
            draft = self.get_draft_model()  # type: ignore[attr-defined]  # a worker's
            if draft is not None:
                yield from draft.parameters()

    def _pifa_kv_cache(self) -> Iterator[Tensor]:
        layers = self.compilation_config.static_forward_context  # type: ignore[attr-defined]  # a worker's
        for layer in layers.values():
            cache = getattr(layer, "kv_cache", None)
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                if isinstance(tensor, Tensor):
                    yield tensor


def linear_backend(device: torch.device) -> str:
    """Name the kernels that `pifa::linear` uses on this device."""
    if device.type == "cpu":
        from pifa_vllm.ops.cpu import load

        return "cpu-native" if load() else "torch"
    return "triton" if device.type == "cuda" else "torch"


def _storages(tensors: Iterator[Tensor]) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in tensors)
