"""A PIFA checkpoint back as an ordinary dense one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pifa_vllm.checkpoint.schema import COEFFICIENTS, PIVOT_ROWS, PIVOT_WEIGHT, read_json
from pifa_vllm.checkpoint.validate import Checkpoint, check_finite
from pifa_vllm.checkpoint.writer import CheckpointWriter
from pifa_vllm.errors import CheckpointError


def densify(directory: Path, output: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the dense model that a PIFA checkpoint stands for: any tool that reads Hugging Face models loads it.

    Each matrix is multiplied out in float64 and rounded once to its factors' dtype. One shard is held in memory at
    a time; the output keeps the source's division into shards and appears whole or not at all.

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
    shards: dict[str, list[str]] = {}
    for name, entry in checkpoint.shards.entries.items():
        shards.setdefault(entry.file.name, []).append(name)

    staging = output.with_name(f".{output.name}.densify")
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        writer = CheckpointWriter(output, staging)
        writer.copy_companions(directory)
        for done, (file, names) in enumerate(sorted(shards.items()), start=1):
            writer.write_shard(file, _dense_tensors(checkpoint, names))
            if progress is not None:
                progress(done, len(shards))
        writer.publish(read_json(directory / "config.json"), None)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _dense_tensors(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    """Load one shard's tensors; a module's weight goes where its pivot weight was."""
    tensors = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        if module in checkpoint.modules and suffix == PIVOT_WEIGHT:
            factors = checkpoint.load(module)
            dtype = factors.pivot_weight.dtype
            tensors[f"{module}.weight"] = factors.to(torch.float64).dense().to(dtype)
        elif module not in checkpoint.modules or suffix not in (COEFFICIENTS, PIVOT_ROWS):
            tensor = checkpoint.shards.load(name)
            check_finite(tensor, f"{checkpoint.shards.entry(name).file}: tensor {name}")
            tensors[name] = tensor
    return tensors
