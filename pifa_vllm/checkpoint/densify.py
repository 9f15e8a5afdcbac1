"""A PIFA checkpoint back as an ordinary dense one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pifa_vllm.checkpoint.schema import PIVOT_WEIGHT, WEIGHT_SCALE, read_json
from pifa_vllm.checkpoint.shards import Shards, TensorEntry
from pifa_vllm.checkpoint.validate import OF_FACTORS, Checkpoint, check_finite
from pifa_vllm.checkpoint.writer import CheckpointWriter
from pifa_vllm.errors import CheckpointError


def densify(directory: Path, output: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the dense model that a PIFA checkpoint stands for: any tool that reads Hugging Face models loads it.

    Each matrix is multiplied out in float64 and rounded once to its factors' dtype, or where they are quantized to
    the embedding's. One shard is held in memory at a time; the output keeps the source's division into shards and
    appears whole or not at all.

    Args:
        directory: a PIFA checkpoint.
        output: the directory to create.
        progress: called with (shards done, shards) after each shard.

    Raises:
        CheckpointError: if the checkpoint is not valid, `output` exists, or it cannot be written.
    """
    checkpoint = Checkpoint.open(directory)
    if output.exists():
        raise CheckpointError(f"{output}: exists; expected a directory to create.")
    dense = DenseShards(checkpoint)
    shards: dict[str, list[str]] = {}
    for name, entry in dense.entries.items():
        shards.setdefault(entry.file.name, []).append(name)

    staging = output.with_name(f".{output.name}.densify")
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        writer = CheckpointWriter(output, staging)
        writer.copy_companions(directory)
        for done, (file, names) in enumerate(sorted(shards.items()), start=1):
            writer.write_shard(file, {name: dense.load(name) for name in names})
            if progress is not None:
                progress(done, len(shards))
        writer.publish(read_json(directory / "config.json"), None)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class DenseShards(Shards):
    """The tensors of the dense model that a PIFA checkpoint stands for, made when they are read.

    Args:
        checkpoint: an open one.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.directory)
        self._checkpoint = checkpoint
        self.entries = {}
        for name, entry in checkpoint.shards.entries.items():
            module, _, suffix = name.rpartition(".")
            if module in checkpoint.modules and suffix in OF_FACTORS:
                if suffix == PIVOT_WEIGHT:
                    dtype = checkpoint.dtype if checkpoint.config.factors else entry.dtype
                    self.entries[f"{module}.weight"] = TensorEntry(
                        entry.file, checkpoint.linear[module], dtype
                    )
            elif name.endswith(".weight") and f"{name}_scale" in checkpoint.shards:
                self.entries[name] = TensorEntry(entry.file, checkpoint.linear[module], checkpoint.dtype)
            elif suffix != WEIGHT_SCALE:
                self.entries[name] = entry

    def load(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Make or read one tensor.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        module, dtype = name.removesuffix(".weight"), self.entry(name).dtype
        if module in self._checkpoint.modules and name.endswith(".weight"):
            return self._checkpoint.load(module).to(torch.float64).dense().to(device, dtype)
        if f"{name}_scale" in self._checkpoint.shards:
            return self._checkpoint.load_dense(module).to(device, dtype)
        tensor = super().load(name, device)
        check_finite(tensor, f"{self.entry(name).file}: tensor {name}")
        return tensor
