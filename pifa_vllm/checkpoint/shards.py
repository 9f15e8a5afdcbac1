"""Reading safetensors shards by tensor name, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pifa_vllm.checkpoint.files import MAX_JSON, check_name, parse_json, quoted, reason
from pifa_vllm.checkpoint.schema import read_json
from pifa_vllm.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and what its shard's header says of it; whether it is one of scales, its name says."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_scale: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it holds floats of 16 bits or more: 8-bit ones are quantized numbers."""
        return self.dtype.is_floating_point and self.dtype.itemsize > 1

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size

    def served_nbytes(self, dtype: torch.dtype) -> int:
        """Size in bytes when floating-point weights are served in `dtype`; what is quantized stays as it is."""
        stays = not self.is_float or self.is_scale
        return self.nbytes if stays else self.nbytes // self.dtype.itemsize * dtype.itemsize


class Shards:
    """The tensors of a model directory, by name, over all of its safetensors shards.

    Opening reads the headers only, which finds missing and truncated shards before any work is done.

    Attributes:
        entries: every tensor by name, as model.safetensors or the index has it.
        unindexed: (file, tensor name) of what the index does not place where it lies. It is not in
            `entries`, but loaders that read whole shards see it.

    Args:
        directory: a Hugging Face model directory with model.safetensors, or an index and its shards.

    Raises:
        CheckpointError: naming the missing, truncated or unreadable file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self.unindexed: list[tuple[Path, str]] = []
        index_path = directory / INDEX_NAME
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory; expected a Hugging Face model directory.")
        if index_path.is_file():
            self._open_index(index_path)
        elif (directory / SINGLE_NAME).is_file():
            for name, entry in read_header(directory / SINGLE_NAME):
                self.entries[name] = entry
        else:
            found = sorted(p.name for p in directory.glob("*.bin")) or "no weights"
            raise CheckpointError(
                f"{directory}: expected {SINGLE_NAME} or {INDEX_NAME}, found {found}. Pickled weights are "
                "not read; save the model with save_pretrained to get safetensors."
            )

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """Return where `name` lies.

        Raises:
            CheckpointError: if no shard holds it.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory}: tensor {name} is missing; its shards hold {len(self.entries)} others."
            ) from None

    def load(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor in its stored dtype.

        Raises:
            CheckpointError: if it is missing or its shard cannot be read.
        """
        entry = self.entry(name)
        try:
            with safe_open(entry.file, framework="pt", device=str(device)) as shard:
                tensor: Tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: tensor {name} cannot be read ({reason(error)}).") from error
        return tensor

    def load_rows(self, name: str, rows: Tensor) -> Tensor:
        """Read some rows of a matrix [m, n] without reading the rest: [rows, n], in the stored dtype.

        Raises:
            CheckpointError: if it is missing, has no such row, or its shard cannot be read.
        """
        entry = self.entry(name)
        unique, inverse = torch.unique(rows, return_inverse=True)
        outside = unique[(unique < 0) | (unique >= entry.shape[0])]
        if outside.numel():
            raise CheckpointError(
                f"{entry.file}: tensor {name} has {entry.shape[0]} rows, but row {int(outside[0])} is asked "
                "for. Do the tokenizer and the model belong together?"
            )
        try:
            with safe_open(entry.file, framework="pt", device="cpu") as shard:
                view = shard.get_slice(name)
                picked = torch.cat([view[int(row) : int(row) + 1] for row in unique])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: tensor {name} cannot be read ({reason(error)}).") from error
        return picked[inverse]

    def _open_index(self, index_path: Path) -> None:
        weight_map = read_json(index_path, strict=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError(
                f"{index_path}: weight_map: expected an object of tensor name to file name."
            )
        headers: dict[str, dict[str, TensorEntry]] = {}
        for file in sorted(set(weight_map.values())):
            path = self.directory / file
            if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
                raise CheckpointError(
                    f"{index_path}: weight_map: expected names of safetensors files in this directory, "
                    f"found {quoted(file)}."
                )
            if not path.is_file():
                raise CheckpointError(f"{path}: shard is missing, but {index_path.name} names it.")
            headers[file] = dict(read_header(path))
        for name, file in weight_map.items():
            check_name(name, f"{index_path}: weight_map")
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.directory / file}: tensor {name} is missing, but {index_path.name} places it "
                    "here."
                )
            self.entries[name] = headers[file][name]
        for file, header in headers.items():
            self.unindexed += [
                (self.directory / file, name) for name in header if weight_map.get(name) != file
            ]


def read_header(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the name and entry of every tensor in one shard.

    Raises:
        CheckpointError: if the file is no safetensors file, not a whole one, or not this user's to read.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a regular file, found something else.")
    if path.exists() and not os.access(path, os.R_OK):
        # safetensors would say that there is none.
        raise CheckpointError(f"{path}: this process's user (id {os.geteuid()}) is not allowed to read it.")
    length = _header_length(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            _check_names(path, length)
            for name in shard.keys():  # noqa: SIM118  # safe_open is no mapping
                view = shard.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{path}: tensor {name}: expected one of the dtypes {sorted(_DTYPES)}, "
                        f"found {view.get_dtype()}."
                    )
                yield name, TensorEntry(path, tuple(view.get_shape()), dtype, name.endswith("_scale"))
    except (SafetensorError, OSError, MemoryError) as error:  # it maps all of the file
        raise CheckpointError(
            f"{path}: not a readable safetensors file, probably truncated or damaged "
            f"({path.stat().st_size} bytes on disk; {reason(error)})."
        ) from error


def _header_length(path: Path) -> int:
    """Read how long a shard's header is; safetensors would take six times as much as a model ever needs.

    Raises:
        CheckpointError: if it is too long, or there is no such file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if length > MAX_JSON:
        raise CheckpointError(
            f"{path}: not a readable safetensors file: expected a header of at most {MAX_JSON} bytes, "
            f"found {length}."
        )
    return length


def _check_names(path: Path, length: int) -> None:
    """Check what safetensors lets pass in a whole header: a tensor that is described twice (the last one counts).

    Raises:
        CheckpointError: naming the tensor.
    """
    with path.open("rb") as file:
        file.seek(8)
        header = parse_json(file.read(length), f"{path}: header")
    for name in header:
        check_name(name, f"{path}: header")
