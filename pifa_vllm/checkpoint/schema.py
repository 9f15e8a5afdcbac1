"""The `quantization_config` of a PIFA checkpoint, and the names of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pifa_vllm.errors import CheckpointError

FORMAT_VERSION: Final = 1
PIVOT_WEIGHT = "pivot_weight"
COEFFICIENTS = "coefficients"
PIVOT_ROWS = "pivot_rows"
BIAS = "bias"


class PIFAConfig(BaseModel):
    """What config.json's `quantization_config` says.

    Attributes:
        density: kept / dense parameters over the compressible linear modules, as measured, in (0, 1].
        ranks: module name to rank; modules that are not named are dense under their usual names.
        provenance: who made the checkpoint, from what and how; free form.
    """

    # Unknown keys are refused: a field from a newer format must not be ignored in silence.
    model_config = ConfigDict(extra="forbid", strict=True)

    quant_method: Literal["pifa"] = "pifa"
    format_version: Literal[1] = FORMAT_VERSION
    density: float = Field(gt=0.0, le=1.0)
    ranks: dict[str, int]
    provenance: dict[str, Any] = Field(default_factory=dict)

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
                    f"{source}: quantization_config.format_version: expected {FORMAT_VERSION}, "
                    f"found {version!r}."
                )
            if version > FORMAT_VERSION:
                raise CheckpointError(
                    f"{source}: this PIFA checkpoint has format_version {version}, expected at most "
                    f"{FORMAT_VERSION}. Update pifa-vllm to read it."
                )
        try:
            config = cls.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["quantization_config", *map(str, first["loc"])])
            raise CheckpointError(f"{source}: {where}: {first['msg']}, found {first['input']!r}.") from error
        for name, rank in config.ranks.items():
            if rank < 0:
                raise CheckpointError(
                    f"{source}: quantization_config.ranks[{name!r}]: expected 0 or more, found {rank}."
                )
        return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face model directory.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_config(directory: Path) -> PIFAConfig:
    """Read and validate the PIFA section of a checkpoint's config.json.

    Raises:
        CheckpointError: if the directory is no PIFA checkpoint, or its section is not valid.
    """
    path = directory / "config.json"
    section = read_json(path).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method != "pifa":
        raise CheckpointError(
            f'{path}: not a PIFA checkpoint: expected quantization_config.quant_method "pifa", '
            f"found {method!r}."
        )
    return PIFAConfig.parse(section, str(path))


def is_pifa(directory: Path) -> bool:
    """Tell whether a readable config.json in this directory names `quant_method: "pifa"`."""
    section = read_json(directory / "config.json").get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "pifa"
