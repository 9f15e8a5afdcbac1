"""The calibration activations of the dense and the compressed model, between decoder layers.

They lie in files that are mapped into memory. While there is room the operating system keeps them in RAM, and
beyond that they live on the disk, without a limit to tune; and since each layer reads one generation of files
and writes the next, the last finished layer's outputs are what a killed run resumes from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pifa_vllm.checkpoint.atomic import make_directory, sync, write_error


@dataclass(frozen=True)
class FlowShape:
    """[samples, length, features] in a storage dtype."""

    samples: int
    length: int
    features: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.samples * self.length * self.features * self.dtype.itemsize


def map_activations(path: Path, shape: FlowShape) -> Tensor:
    """Map a file as a [samples, length, features] tensor, creating it if needed.

    The blocks are allocated at once: on a full disk this raises here, where a sparse file would kill the process
    by a bus error in the middle of a layer.

    Raises:
        CheckpointError: if the file cannot be created at its full size.
    """
    try:
        with path.open("ab") as file:
            if os.path.getsize(path) != shape.nbytes:
                os.ftruncate(file.fileno(), 0)
                os.posix_fallocate(file.fileno(), 0, shape.nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise write_error(path, error) from error
    count = shape.samples * shape.length * shape.features
    flat = torch.from_file(str(path), shared=True, size=count, dtype=shape.dtype)
    return flat.view(shape.samples, shape.length, shape.features)


class Flows:
    """Hidden states entering each layer in the dense and in the compressed model.

    Args:
        directory: where the files lie.
        shape: of each flow's hidden states.

    Raises:
        CheckpointError: if the directory cannot be created.
    """

    def __init__(self, directory: Path, shape: FlowShape) -> None:
        self.directory = directory
        self.shape = shape
        make_directory(directory)

    def entering(self, layer: int) -> tuple[Tensor, Tensor]:
        """Map (dense, compressed) hidden states entering `layer`, each [samples, length, hidden]."""
        return (
            map_activations(self._path("dense", layer), self.shape),
            map_activations(self._path("compressed", layer), self.shape),
        )

    def complete(self, layer: int) -> bool:
        """Tell whether both files entering `layer` are there at their full size."""
        paths = (self._path("dense", layer), self._path("compressed", layer))
        return all(path.is_file() and path.stat().st_size == self.shape.nbytes for path in paths)

    def commit(self, layer: int) -> None:
        """Push the states entering `layer` to the disk.

        Raises:
            CheckpointError: if they cannot be written there.
        """
        for path in (self._path("dense", layer), self._path("compressed", layer), self.directory):
            try:
                sync(path)
            except OSError as error:
                raise write_error(path, error) from error

    def discard(self, layer: int) -> None:
        """Delete the states entering `layer`, once those of the next one are committed."""
        self._path("dense", layer).unlink(missing_ok=True)
        self._path("compressed", layer).unlink(missing_ok=True)

    def scratch(self, features: int) -> Tensor:
        """Map room for one intermediate activation of the compressed model, [samples, length, features]."""
        shape = FlowShape(self.shape.samples, self.shape.length, features, self.shape.dtype)
        return map_activations(self.directory / f"scratch-{features}.bin", shape)

    def _path(self, flow: str, layer: int) -> Path:
        return self.directory / f"{flow}-{layer:05d}.bin"
