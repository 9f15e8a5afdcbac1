"""The `quantization_config` of a PIFA checkpoint, and the names of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pifa_vllm.checkpoint.files import MAX_CONFIG, MAX_JSON, check_name, parse_json, quoted, read_file
from pifa_vllm.errors import CheckpointError
from pifa_vllm.quantization import DTYPES

# What this package reads. Checkpoints without quantized factors are written as the first version.
FORMAT_VERSION: Final = 2
_MAX_RANK: Final = (1 << 31) - 1
PIVOT_WEIGHT = "pivot_weight"
COEFFICIENTS = "coefficients"
PIVOT_ROWS = "pivot_rows"
PIVOT_COLUMNS = "pivot_columns"
PIVOT_SCALE = "pivot_scale"
COEFFICIENT_SCALE = "coefficient_scale"
WEIGHT_SCALE = "weight_scale"
BIAS = "bias"


def factor_shapes(pivots: str, m: int, n: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the two factors of a matrix [m, n]: of its pivots, and of the coefficients.

    Args:
        pivots: `PIVOT_ROWS` or `PIVOT_COLUMNS`.
        m: outputs.
        n: inputs.
        rank: r.
    """
    if pivots == PIVOT_COLUMNS:
        return (m, rank), (rank, n - rank)
    return (rank, n), (m - rank, rank)


class FactorFormat(BaseModel):
    """How the linear modules' numbers are quantized, see `pifa_vllm.quantization`.

    Attributes:
        bits: of pivot rows or columns, and of modules that are dense.
        coefficient_bits: of coefficients, whose errors weigh more.
        type: "int", or "float" for float8_e4m3fn.
        group_size: numbers of a row that share a scale; None for all of them.
        symmetric: there is no zero point.
        pivot_columns: the kinds of modules, by the last part of their names, that have pivot columns in place of
            pivot rows. What serving fuses has one or the other.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    bits: Literal[4, 8]
    coefficient_bits: Literal[4, 8]
    type: Literal["int", "float"] = "int"
    group_size: Literal[32, 64, 128, 256] | None = None
    symmetric: Literal[True] = True
    pivot_columns: list[Literal["gate_proj", "up_proj"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> FactorFormat:
        if self.type == "float" and (self.bits, self.coefficient_bits) != (8, 8):
            raise ValueError("floats have 8 bits")
        if self.pivot_columns not in ([], ["gate_proj", "up_proj"]):
            raise ValueError("pivot_columns are those of gate_proj and up_proj or of none")
        return self

    def pivots(self, name: str) -> str:
        """What the pivots of a module are called, and the tensor of their indices."""
        return PIVOT_COLUMNS if name.rpartition(".")[2] in self.pivot_columns else PIVOT_ROWS

    @property
    def dtype(self) -> torch.dtype:
        """Of pivot rows and dense modules."""
        return DTYPES[self.bits, self.type]

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """Of coefficients."""
        return DTYPES[self.coefficient_bits, self.type]

    @property
    def group(self) -> int:
        """Numbers of a row that share a scale, 0 for all of them."""
        return self.group_size or 0


class PIFAConfig(BaseModel):
    """What config.json's `quantization_config` says.

    Attributes:
        density: kept / dense parameters over the compressible linear modules, as measured, in (0, 1].
        ranks: module name to rank; modules that are not named are dense under their usual names.
        factors: how the decoder's linear modules are quantized; None in version 1, where they are not.
        provenance: who made the checkpoint, from what and how; free form.
    """

    # Unknown keys are refused: a field from a newer format must not be ignored in silence.
    model_config = ConfigDict(extra="forbid", strict=True)

    quant_method: Literal["pifa"] = "pifa"
    format_version: Literal[1, 2] = 1
    density: float = Field(gt=0.0, le=1.0)
    ranks: dict[str, int]
    factors: FactorFormat | None = Field(default=None, exclude_if=lambda factors: factors is None)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_version(self) -> PIFAConfig:
        if (self.format_version == 2) != (self.factors is not None):
            raise ValueError("format_version 2 has factors, and version 1 has none")
        return self

    @classmethod
    def parse(cls, section: object, source: str) -> PIFAConfig:
        """Validate a `quantization_config` section.

        Args:
            section: the decoded JSON value.
            source: the file to name in errors.

        Raises:
            CheckpointError: naming the offending field, expected and found.
        """
        if isinstance(section, dict) and section.get("quant_method") == "pifa":
            version = section.get("format_version")
            if type(version) is not int:
                # The default is for writers only, and a Literal takes True and 1.0 for 1.
                raise CheckpointError(
                    f"{source}: quantization_config.format_version: expected 1 to {FORMAT_VERSION}, "
                    f"found {quoted(version)}."
                )
            if version > FORMAT_VERSION:
                raise CheckpointError(
                    f"{source}: this PIFA checkpoint has format_version {quoted(version)}, expected at most "
                    f"{FORMAT_VERSION}. Update pifa-vllm to read it."
                )
        try:
            config = cls.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            place = [part if str(part).isprintable() else quoted(part) for part in first["loc"]]
            where = ".".join(["quantization_config", *map(str, place)])
            raise CheckpointError(
                f"{source}: {where}: {first['msg']}, found {quoted(first['input'])}."
            ) from error
        for name, rank in config.ranks.items():
            check_name(name, f"{source}: quantization_config.ranks")
            if not 0 <= rank <= _MAX_RANK:
                raise CheckpointError(
                    f"{source}: quantization_config.ranks[{name!r}]: expected 0 or more, as int32 holds it, "
                    f"found {quoted(rank)}."
                )
        return config


def read_json(path: Path, *, strict: bool = False, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: a regular file.
        strict: see `parse_json`; the configs of other models need not be as strict.
        limit: on its size in bytes.

    Raises:
        CheckpointError: if the file is missing, too large, is not JSON, or is not an object.
    """
    try:
        value = parse_json(read_file(path, limit), path, strict=strict)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face model directory.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_config(directory: Path) -> PIFAConfig:
    """Read and validate the PIFA section of a checkpoint's config.json.

    Raises:
        CheckpointError: if the directory is no PIFA checkpoint, or its section is not valid.
    """
    path = directory / "config.json"
    return parse_section(read_model_config(path), path)


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a config.json that is to be a PIFA checkpoint's.

    Raises:
        CheckpointError: if it cannot be read as one, and in the same way by everybody.
    """
    return read_json(path, strict=True, limit=MAX_CONFIG)


def parse_section(config: dict[str, Any], path: Path) -> PIFAConfig:
    """Validate the PIFA section of a decoded config.json.

    Raises:
        CheckpointError: if there is none, or it is not valid.
    """
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method != "pifa":
        raise CheckpointError(
            f'{path}: not a PIFA checkpoint: expected quantization_config.quant_method "pifa", '
            f"found {quoted(method)}."
        )
    return PIFAConfig.parse(section, str(path))


def is_pifa(directory: Path) -> bool:
    """Tell whether a readable config.json in this directory names `quant_method: "pifa"`."""
    section = read_json(directory / "config.json").get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "pifa"
