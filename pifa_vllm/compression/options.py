"""What a compression run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pifa_vllm.checkpoint import FactorFormat
from pifa_vllm.compression.allocation import Recipe
from pifa_vllm.compression.report.schema import Allocation, Method, Metric, Representation
from pifa_vllm.errors import PifaError

# Measured on SmolLM2-135M over densities 0.5 to 0.8, see the README's table of results.
DEFAULT_RIDGE: dict[Method, float] = {
    "svd": 0.0,
    "svd-llm": 1e-6,
    "mpifa": 1e-3,
    "mpifa-exact": 1e-3,
    "quantize": 0.0,
}
# The paper's for its own update. mpifa-exact shrinks its correction by what it is worth on other samples, and does
# best with the whole of the dense model's output as its target.
DEFAULT_MIX: dict[Method, float] = {
    "svd": 0.0,
    "svd-llm": 0.0,
    "mpifa": 0.25,
    "mpifa-exact": 1.0,
    "quantize": 1.0,
}

# As `--factors` calls them. Coefficients keep 8 bits beside pivot rows of 4: their errors reach the outputs times
# pivot outputs, which otherwise cancel one another.
# Where m > n most numbers are coefficients with pivot rows, and few with pivot columns.
_with_columns = partial(FactorFormat, pivot_columns=["gate_proj", "up_proj"])
FACTORS = {
    "int8": _with_columns(bits=8, coefficient_bits=8, group_size=128),
    "int4": _with_columns(bits=4, coefficient_bits=8, group_size=32),
    "fp8": _with_columns(bits=8, coefficient_bits=8, type="float"),
}


@dataclass(frozen=True)
class CompressOptions:
    """Options of one run; every one that bears on the result is part of its fingerprint.

    Attributes:
        model: dense Hugging Face model directory.
        output: checkpoint directory to create.
        method: "svd", "svd-llm", "mpifa" or "mpifa-exact"; or "quantize", for which the model is a PIFA checkpoint
            that keeps its ranks.
        representation: "pifa" stores PIFA; "lowrank" budgets by plain low rank's parameter count and stores the
            reconstructed dense weights, for evaluation.
        density: density of every module, or of the model as a whole where ranks are allocated.
        calibration: text file, JSONL file, dataset name, or "self".
        text_field: field of a JSONL file or dataset that holds the text.
        samples: calibration sequences.
        length: tokens per sequence.
        seed: of the sampling.
        allocation: "uniform" gives every module its density, "sensitivity" divides the model's density among the
            modules by what each rank is worth to the loss; None takes the method's default, "uniform" where the
            recipe has rules.
        metric: of the modules' errors: "inputs" of what they are on the calibration inputs, "outputs" of what the
            loss makes of that, too; None takes the method's default.
        gradient_samples: of the samples, how many the gradients for either are of; None takes all of them.
        mix: λ, the share of the dense flow in M's target; None takes the method's default.
        feedback: μ, the share of the residual stream's error that mpifa-exact asks o and down to undo.
        ridge: relative ridge of the method's solves; None takes the method's default.
        tile: ranks are multiples of this.
        dtype: storage dtype, None keeps the model's.
        factors: how the linear modules' numbers are quantized, None keeps them in the storage dtype.
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
    allocation: Allocation | None = None
    metric: Metric | None = None
    gradient_samples: int | None = None
    mix: float | None = None
    feedback: float = 1.0
    ridge: float | None = None
    tile: int = 16
    dtype: str | None = None
    factors: FactorFormat | None = None
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
        if self.effective_allocation == "sensitivity" and self.density.rules:
            raise PifaError(
                "--allocation sensitivity: chooses the modules' densities itself, expected --density alone, found "
                f"{len(self.density.rules)} rules beside it."
            )
        if self.effective_metric == "outputs" and self.method not in ("svd-llm", "mpifa-exact"):
            raise PifaError(
                f"--metric outputs: --method {self.method} has no metric, expected svd-llm or mpifa-exact."
            )
        if self.gradient_samples is not None and not 1 <= self.gradient_samples <= self.samples:
            raise PifaError(
                f"--gradient-samples: expected 1 to {self.samples} (--samples), found {self.gradient_samples}."
            )
        if not 0.0 <= self.effective_ridge < 1e6:
            raise PifaError(f"--ridge: expected a number of 0 or more, found {self.ridge}.")
        if self.method == "quantize" and self.factors is None:
            raise PifaError("--method quantize: expected --factors, found none.")
        if self.factors is not None and self.representation != "pifa":
            raise PifaError(
                f"--factors: are quantized in pivoting form, expected --representation pifa, found "
                f"{self.representation}."
            )
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
    def effective_allocation(self) -> Allocation:
        """The allocation that is used: the given one, or the method's default."""
        if self.allocation is not None:
            return self.allocation
        return "sensitivity" if self.method == "mpifa-exact" and not self.density.rules else "uniform"

    @property
    def effective_metric(self) -> Metric:
        """The metric that is used: the given one, or the method's default."""
        return self.metric or ("outputs" if self.method == "mpifa-exact" else "inputs")

    @property
    def uses_gradients(self) -> bool:
        """Whether the dense model's gradients are needed."""
        return self.effective_allocation == "sensitivity" or self.effective_metric == "outputs"

    @property
    def effective_gradient_samples(self) -> int:
        """Of how many samples they are: the given number, or all of them."""
        return self.gradient_samples or self.samples

    @property
    def folds(self) -> int:
        """Into how many parts the calibration samples are divided."""
        return 2 if self.method in ("mpifa-exact", "quantize") else 1

    @property
    def uses_compressed_inputs(self) -> bool:
        """Whether modules are solved on the compressed flow's inputs (M) or on the dense flow's alone."""
        return self.method in ("mpifa", "mpifa-exact", "quantize")

    @property
    def uses_drift(self) -> bool:
        """Whether the residual stream's error is part of the targets."""
        return self.method in ("mpifa-exact", "quantize") and self.feedback > 0.0

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
            "allocation": self.effective_allocation,
            "metric": self.effective_metric,
            "gradient_samples": self.effective_gradient_samples if self.uses_gradients else 0,
            "mix": self.effective_mix,
            "feedback": self.feedback,
            "ridge": self.effective_ridge,
            "tile": self.tile,
            "dtype": self.dtype,
            "factors": None if self.factors is None else self.factors.model_dump(),
            "activation_dtype": self.activation_dtype,
            # Chunks are what the samples are divided into folds by.
            "chunk_tokens": self.chunk_tokens,
        }
