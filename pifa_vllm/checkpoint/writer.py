"""Writing a checkpoint so that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pifa_vllm.checkpoint.atomic import make_directory, replace_file, replace_text, sync, write_error
from pifa_vllm.checkpoint.schema import (
    BIAS,
    COEFFICIENT_SCALE,
    COEFFICIENTS,
    PIVOT_COLUMNS,
    PIVOT_ROWS,
    PIVOT_SCALE,
    PIVOT_WEIGHT,
    PIFAConfig,
    read_json,
)
from pifa_vllm.checkpoint.shards import INDEX_NAME, read_header
from pifa_vllm.errors import CheckpointError
from pifa_vllm.factorization import PIFA
from pifa_vllm.quantization import QuantizedPIFA

# Everything a Hugging Face directory holds besides weights and config: tokenizer, chat template, generation, and
# the licence, which has to go with every copy.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COMPANIONS = {"adapter_config.json", "compression_report.json", "config.json", "params.json"}


class CheckpointWriter:
    """Collects shards in `staging` and publishes them as `output` in one rename.

    Shards are written to a temporary name, synced and renamed, so a shard that exists is complete. The index
    and config.json come last: a staging directory that lacks them loads nowhere.

    Args:
        output: the directory to create; must not exist when `publish` is called.
        staging: work directory on the same file system; created if needed, reused on resume.

    Raises:
        CheckpointError: if `staging` cannot be created.
    """

    def __init__(self, output: Path, staging: Path) -> None:
        self.output = output
        self.staging = staging
        make_directory(staging)

    def write_shard(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Write one shard, whole or not at all.

        Raises:
            CheckpointError: if it cannot be written, the disk being full among the causes.
        """
        # A view that is not contiguous would make safetensors refuse it.
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        replace_file(self.staging / file, lambda path: save_file(whole, path, metadata={"format": "pt"}))

    def write_json(self, file: str, value: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_text(self, file: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        replace_text(self.staging / file, text)

    def copy_companions(self, source: Path) -> None:
        """Copy tokenizer, generation config and the like from a Hugging Face directory.

        Untouched, but for the names of Python classes that a tokenizer's config may ask to import: no code is
        copied, and checkpoints that ask for some are refused.
        """
        for pattern in _COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if (
                    path.is_file()
                    and path.name not in _NOT_COMPANIONS
                    and not path.name.endswith(".index.json")
                ):
                    try:
                        if path.name.endswith("_config.json") and b'"auto_map"' in path.read_bytes():
                            self.write_json(path.name, _without_code(read_json(path)))
                            continue
                        shutil.copyfile(path, self.staging / path.name)
                        sync(self.staging / path.name)
                    except OSError as error:
                        raise write_error(self.staging / path.name, error) from error

    def tensor_bytes(self, counts: Callable[[str], bool] = lambda _: True) -> int:
        """Bytes of the tensors in the shards that were written, of those whose names count."""
        shards = self.staging.glob("*.safetensors")
        return sum(entry.nbytes for path in shards for name, entry in read_header(path) if counts(name))

    def publish(self, model_config: dict[str, Any], pifa_config: PIFAConfig | None) -> None:
        """Write index and config.json, then make the directory appear as `output`.

        Args:
            model_config: the dense model's config.json, kept as it is but for the dtype, our section, and the
                names of classes to import.
            pifa_config: None writes an ordinary dense checkpoint.

        Raises:
            CheckpointError: if `output` exists by now or a file cannot be written.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for path in sorted(self.staging.glob("*.safetensors")):
            for name, entry in read_header(path):
                weight_map[name] = path.name
                total += entry.nbytes
        self.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = {k: v for k, v in _without_code(model_config).items() if k != "quantization_config"}
        if pifa_config is not None:
            config["quantization_config"] = pifa_config.model_dump()
        self.write_json("config.json", config)
        if self.output.exists():
            raise CheckpointError(
                f"{self.output}: exists by now, though it did not at the start; the finished checkpoint is "
                f"kept in {self.staging}."
            )
        for scratch in self.staging.glob(".*.tmp"):
            scratch.unlink()  # of a run that was killed while it wrote
        try:
            sync(self.staging)
            os.rename(self.staging, self.output)
            sync(self.output.parent)
        except OSError as error:
            raise write_error(self.output, error) from error


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "auto_map"}


def module_tensors(
    name: str, factors: PIFA | QuantizedPIFA, bias: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Name a compressed module's tensors as the format does, rounded to `dtype` where they are not quantized."""
    if isinstance(factors, QuantizedPIFA):
        tensors = {
            f"{name}.{PIVOT_COLUMNS if factors.columns else PIVOT_ROWS}": factors.pivots,
            f"{name}.{PIVOT_WEIGHT}": factors.pivot_weight.numbers,
            f"{name}.{PIVOT_SCALE}": factors.pivot_weight.scale,
            f"{name}.{COEFFICIENTS}": factors.coefficients.numbers,
            f"{name}.{COEFFICIENT_SCALE}": factors.coefficients.scale,
        }
    else:
        stored = factors.to(dtype)
        tensors = {
            f"{name}.{PIVOT_ROWS}": factors.pivot_rows,
            f"{name}.{PIVOT_WEIGHT}": stored.pivot_weight,
            f"{name}.{COEFFICIENTS}": stored.coefficients,
        }
    if bias is not None:
        tensors[f"{name}.{BIAS}"] = bias.to(dtype)
    return tensors
