"""What a compression run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pifa_vllm.compression.allocation import Recipe
from pifa_vllm.compression.report.schema import Method, Representation
from pifa_vllm.errors import PifaError

# Measured on SmolLM2-135M over densities 0.5 to 0.8, see the README's table of results.
DEFAULT_RIDGE: dict[Method, float] = {"svd": 0.0, "svd-llm": 1e-6, "mpifa": 1e-3, "mpifa-exact": 1e-3}
# The paper's for its own update. mpifa-exact shrinks its correction by what it is worth on other samples, and does
# best with the whole of the dense model's output as its target.
DEFAULT_MIX: dict[Method, float] = {"svd": 0.0, "svd-llm": 0.0, "mpifa": 0.25, "mpifa-exact": 1.0}


@dataclass(frozen=True)
class CompressOptions:
    """Options of one run; every one that bears on the result is part of its fingerprint.

    Attributes:
        model: dense Hugging Face model directory.
        output: checkpoint directory to create.
        method: "svd", "svd-llm", "mpifa" or "mpifa-exact".
        representation: "pifa" stores PIFA; "lowrank" budgets by plain low rank's parameter count and stores the
            reconstructed dense weights, for evaluation.
        density: density of every module.
        calibration: text file, JSONL file, dataset name, or "self".
        text_field: field of a JSONL file or dataset that holds the text.
        samples: calibration sequences.
        length: tokens per sequence.
        seed: of the sampling.
        mix: λ, the share of the dense flow in M's target; None takes the method's default.
        feedback: μ, the share of the residual stream's error that mpifa-exact asks o and down to undo.
        ridge: relative ridge of the method's solves; None takes the method's default.
        tile: ranks are multiples of this.
        dtype: storage dtype, None keeps the model's.
        activation_dtype: storage dtype of the two flows.
        device: where to compute.
        chunk_tokens: tokens per forward pass.
    """

    model: Path
    output: Path
    density: Recipe
    method: Method = "mpifa-exact"
    representation: Representation = "pifa"
    calibration: str = "self"
    text_field: str = "text"
    samples: int = 128
    length: int = 2048
    seed: int = 0
    mix: float | None = None
    feedback: float = 1.0
    ridge: float | None = None
    tile: int = 16
    dtype: str | None = None
    activation_dtype: str = "float32"
    device: str = "cpu"
    chunk_tokens: int = 2048

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("length", 8), ("tile", 1), ("chunk_tokens", 1)):
            if getattr(self, name) < low:
                raise PifaError(
                    f"--{name.replace('_', '-')}: expected {low} or more, found {getattr(self, name)}."
                )
        for name, share in (("mix", self.effective_mix), ("feedback", self.feedback)):
            if not 0.0 <= share <= 1.0:
                raise PifaError(f"--{name}: expected a number in [0, 1], found {share}.")
        if not 0.0 <= self.effective_ridge < 1e6:
            raise PifaError(f"--ridge: expected a number of 0 or more, found {self.ridge}.")
        if self.samples < self.folds:
            raise PifaError(
                f"--samples: --method {self.method} judges on one part of the samples what it learns from the "
                f"other, expected {self.folds} or more, found {self.samples}."
            )

    @property
    def effective_ridge(self) -> float:
        """The ridge that is used: the given one or the method's default."""
        return DEFAULT_RIDGE[self.method] if self.ridge is None else self.ridge

    @property
    def effective_mix(self) -> float:
        """The mix that is used: the given one or the method's default."""
        return DEFAULT_MIX[self.method] if self.mix is None else self.mix

    @property
    def folds(self) -> int:
        """Into how many parts the calibration samples are divided."""
        return 2 if self.method == "mpifa-exact" else 1

    @property
    def uses_compressed_inputs(self) -> bool:
        """Whether modules are solved on the compressed flow's inputs (M) or on the dense flow's alone."""
        return self.method in ("mpifa", "mpifa-exact")

    @property
    def uses_drift(self) -> bool:
        """Whether the residual stream's error is part of the targets."""
        return self.method == "mpifa-exact" and self.feedback > 0.0

    def record(self) -> dict[str, Any]:
        """List what bears on the result, in JSON types, for the fingerprint and the report."""
        return {
            "method": self.method,
            "representation": self.representation,
            "density": self.density.model_dump(),
            "calibration": self.calibration,
            "text_field": self.text_field,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "mix": self.effective_mix,
            "feedback": self.feedback,
            "ridge": self.effective_ridge,
            "tile": self.tile,
            "dtype": self.dtype,
            "activation_dtype": self.activation_dtype,
            # Chunks are what the samples are divided into folds by.
            "chunk_tokens": self.chunk_tokens,
        }
