"""What `bench quality` is to measure: one YAML file.

    model: smollm2-135m             # the dense model; all paths are as seen from where the command runs
    texts: {development: raw-development.txt}
    seqlen: 1024                    # tokens per window
    max_windows: 64                 # of each text; all of them where it is left out
    densities: [0.9, 0.8, 0.6, 0.5]
    seeds: [0]                      # of the calibration
    calibration: {calibration: raw-calibration.txt, samples: 16, length: 1024}
    against: mpifa-exact            # the variant that the others of a density are compared with
    variants:
      mpifa-exact: {compress: {}, seeds: {0.8: [0, 1, 2]}}
      svd-llm: {compress: {method: svd-llm, representation: lowrank}}
      healed: {directory: "runs/healed-{density}"}
      int8: {rival: round, bits: 8, group: 64}
      sparse: {directory: sparse-checkpoint, number_bits: 9, flops_share: 0.5}

`calibration` and `compress` are options of `pifa-vllm compress` without their dashes. The dense model is always
measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pifa_vllm.errors import PifaError
from pifa_vllm.quantization import GROUP_SIZES

Scalar = bool | int | float | str
DENSE = "dense"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Variant(_Part):
    """One way to a smaller model: exactly one of the first three.

    Attributes:
        compress: options of `pifa-vllm compress`, on top of the plan's `calibration`.
        directory: a checkpoint that is there; "{density}" in it stands for each density.
        rival: what else the dense model can be made into, see `rivals.py`.
        bits: of a number, for the rivals that round.
        group: neighbours in a row that share a scale, for the same.
        number_bits: what a number takes as such a checkpoint is served, on average and with its scales or
            positions; a directory's own (16 bits for a number that is kept) where it is left out.
        flops_share: of the dense model's FLOPs, likewise.
        densities: in place of the plan's.
        seeds: in place of the plan's, for all densities or for those that are named.
    """

    compress: dict[str, Scalar] | None = None
    directory: str | None = None
    rival: Literal["round", "gptq", "magnitude", "wanda", "sparsegpt"] | None = None
    bits: int = Field(default=8, ge=2, le=8)
    group: int = Field(default=64, ge=1)
    number_bits: float | None = Field(default=None, gt=0.0)
    flops_share: float = Field(default=1.0, gt=0.0)
    densities: list[float] | None = None
    seeds: list[int] | dict[float, list[int]] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Variant:
        given = [name for name in ("compress", "directory", "rival") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected one of compress, directory and rival, found {' and '.join(given) or 'none'}"
            )
        if self.rival == "gptq" and (self.bits not in (4, 8) or self.group not in GROUP_SIZES):
            raise ValueError(
                f"gptq: expected 4 or 8 bits in groups of {', '.join(map(str, GROUP_SIZES))}, found {self.bits} "
                f"in groups of {self.group}"
            )
        return self


@dataclass(frozen=True)
class Case:
    """One checkpoint to be measured. `density` and `seed` are None where there is no such choice."""

    name: str
    variant: Variant
    density: float | None
    seed: int | None


class Plan(_Part):
    """The file, see above."""

    model: Path
    texts: dict[str, Path] = Field(min_length=1)
    seqlen: int = Field(default=1024, ge=2)
    max_windows: int | None = Field(default=None, ge=1)
    densities: list[float] = Field(default=[0.8], min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    calibration: dict[str, Scalar] = Field(default_factory=dict)
    against: str | None = None
    variants: dict[str, Variant] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if DENSE in self.variants:
            raise ValueError(f"variants: {DENSE!r} is the dense model's own row, expected another name")
        if self.against is not None and self.against not in self.variants:
            raise ValueError(f"against: expected one of the variants, found {self.against!r}")
        for density in (*self.densities, *(d for v in self.variants.values() for d in v.densities or ())):
            if not 0.0 < density <= 1.0:
                raise ValueError(f"densities: expected numbers in (0, 1], found {density:g}")
        return self

    def cases(self) -> Iterator[Case]:
        """Every checkpoint, the first seeds of all variants first."""
        calibrated = [
            (turn, Case(name, variant, density, seed))
            for density in dict.fromkeys(self._all_densities())
            for name, variant in self.variants.items()
            if variant.compress is not None and density in (variant.densities or self.densities)
            for turn, seed in enumerate(self._seeds(variant, density))
        ]
        yield from (case for turn, case in calibrated if turn == 0)
        yield from self._uncalibrated()
        yield from (case for turn, case in sorted(calibrated, key=lambda x: x[0]) if turn > 0)

    def _uncalibrated(self) -> Iterator[Case]:
        for name, variant in self.variants.items():
            if variant.rival is not None:
                yield Case(name, variant, None, None)
            elif variant.directory is not None and "{density}" in variant.directory:
                for density in variant.densities or self.densities:
                    yield Case(name, variant, density, None)
            elif variant.directory is not None:
                yield Case(name, variant, None, None)

    def _seeds(self, variant: Variant, density: float) -> list[int]:
        if isinstance(variant.seeds, dict):
            return variant.seeds.get(density, self.seeds)
        return variant.seeds or self.seeds

    def _all_densities(self) -> Iterator[float]:
        yield from self.densities
        for variant in self.variants.values():
            yield from variant.densities or ()


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        PifaError: if it cannot be read or is none, naming the field, what is expected and what was found.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PifaError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] == "value_error" else f", found {str(first['input'])[:60]!r}"
        raise PifaError(f"{path}: {where + ': ' if where else ''}{message}{found}.") from error


def options(values: dict[str, Scalar]) -> list[str]:
    """As a command line has them: {"tile": 4, "dry-run": True} is --tile 4 --dry-run; False leaves one out."""
    words: list[str] = []
    for name, value in values.items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def identity(case: Case, plan: Plan) -> dict[str, Any]:
    """What makes a row of the results this case's, besides model, text and windows."""
    same = case.variant.model_dump(exclude_unset=True, exclude={"densities", "seeds"})
    if case.variant.directory is None:
        same["calibration"] = plan.calibration
    else:
        same["directory"] = case.variant.directory.replace("{density}", f"{case.density or 0:g}")
        # One that was written anew is another one.
        weights = Path(same["directory"]).glob("*.safetensors")
        same["written"] = max((path.stat().st_mtime_ns for path in weights), default=0)
    return {"variant": case.name, "density": case.density, "seed": case.seed, "how": same}
