"""What a healing run is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pifa_vllm.errors import PifaError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class HealOptions:
    """Options of one run.

    Attributes:
        model: PIFA checkpoint directory.
        output: checkpoint directory to create.
        teacher: the dense model directory that `model` was compressed from.
        tokens: training tokens to see; passes over the text follow one another until there are as many.
        calibration: text file, JSONL file, token file, dataset name, or "self".
        text_field: field of a JSONL file or dataset that holds the text.
        length: tokens per sequence.
        batch: sequences per step, all of one forward pass.
        lr: peak learning rate of AdamW.
        weight_decay: AdamW's, of factors, not of norms.
        warmup: share of the steps over which the rate rises; then it falls as a cosine does.
        held_out: share of the sequences, the last ones, that judge and are not trained on.
        every: steps between two looks at the held-out text, after each of which the state is saved; None makes
            ten of them.
        embeddings: train the embedding and the output head, too.
        gradient_checkpointing: recompute each layer's activations in the backward pass, for memory.
        precision: of the matrix products; None takes bfloat16 on GPUs and float32 on CPUs. Parameters and
            optimizer are float32 in any case.
        seed: of the order of the sequences, and of "self".
        device: where to compute.
    """

    model: Path
    output: Path
    teacher: Path
    tokens: int
    calibration: str = "self"
    text_field: str = "text"
    length: int = 512
    batch: int = 4
    lr: float = 3e-5
    weight_decay: float = 0.0
    warmup: float = 0.05
    held_out: float = 0.05
    every: int | None = None
    embeddings: bool = False
    gradient_checkpointing: bool = True
    precision: Precision | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, low in (("length", 8), ("batch", 1), ("every", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise PifaError(f"--{name}: expected {low} or more, found {value}.")
        if not 0.0 < self.lr < float("inf"):
            raise PifaError(f"--lr: expected a number above 0, found {self.lr}.")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise PifaError(f"--weight-decay: expected a number of 0 or more, found {self.weight_decay}.")
        if not 0.0 <= self.warmup < 1.0:
            raise PifaError(f"--warmup: expected a share in [0, 1), found {self.warmup}.")
        if not 0.0 < self.held_out < 1.0:
            raise PifaError(f"--held-out: expected a share between 0 and 1, found {self.held_out}.")
        if self.tokens < self.batch * self.length:
            raise PifaError(
                f"--tokens: expected one step of {self.batch} x {self.length} tokens or more, found {self.tokens}."
            )

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.tokens // (self.batch * self.length)

    @property
    def interval(self) -> int:
        """Steps between two looks at the held-out text."""
        return self.every or max(1, self.steps // 10)

    @property
    def effective_precision(self) -> Precision:
        """The precision that is used: the given one or the device's."""
        return self.precision or ("float32" if self.device == "cpu" else "bfloat16")

    def record(self) -> dict[str, Any]:
        """List what bears on the result, in JSON types."""
        apart = ("model", "output", "teacher", "gradient_checkpointing", "device")
        options = {name: value for name, value in asdict(self).items() if name not in apart}
        return options | {"every": self.interval, "precision": self.effective_precision}
