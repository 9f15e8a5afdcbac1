"""The text of a healing run: sequences to learn from, and others that judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.compression.calibration.kept import load_kept
from pifa_vllm.compression.calibration.samples import CalibrationSet, load_sequences
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.errors import CalibrationError
from pifa_vllm.healing.options import HealOptions

# The model's own samples are dear, and the text is seen several times anyway.
_PASSES_OF_SELF = 4


@dataclass(frozen=True)
class Text:
    """Sequences that share no token.

    Attributes:
        train: int64 [sequences, length].
        held_out: int64 [sequences, length], the end of the text.
        record: provenance in JSON types.
    """

    train: Tensor
    held_out: Tensor
    record: dict[str, Any]


def load_text(
    options: HealOptions, teacher: DenseModel, staging: Path, on_progress: Callable[[int, int], None]
) -> Text:
    """Read the text and divide it.

    Args:
        options: of the run.
        teacher: the dense model, which samples where it is asked to.
        staging: where its samples are kept.
        on_progress: called with tokens done and tokens in all while the model samples.

    Raises:
        CalibrationError: if the source cannot be used, or is too short for one step and something to judge by.
    """
    wanted = -(-options.tokens // options.length)
    if options.calibration == "self":
        wanted = max(-(-wanted // _PASSES_OF_SELF), options.batch)
    wanted += max(2, round(wanted * options.held_out))

    def load(spec: str) -> CalibrationSet:
        return load_sequences(
            spec,
            load_tokenizer(options.teacher),
            most=wanted,
            length=options.length,
            seed=options.seed,
            model_dir=options.teacher,
            field=options.text_field,
            device=options.device,
            on_progress=on_progress,
        )

    text = load_kept(
        options.calibration,
        load,
        staging=staging,
        model=teacher,
        samples=wanted,
        length=options.length,
        seed=options.seed,
    )
    count = len(text.tokens)
    judges = max(2, round(count * options.held_out))
    if count - judges < options.batch:
        raise CalibrationError(
            f"--calibration {options.calibration}: expected {options.batch + judges} sequences of {options.length} "
            f"tokens at least, {judges} of them held out to judge by, found {count}. Give more text, or a smaller "
            "--length or --batch."
        )
    return Text(text.tokens[:-judges], text.tokens[-judges:], text.record)


def batch_indices(step: int, batch: int, sequences: int, seed: int) -> list[int]:
    """Say which sequences a step sees: each pass over the text is in a random order of its own.

    It depends on nothing but its arguments, so that a run which is killed goes on with the same ones.
    """
    indices = []
    for place in range(step * batch, (step + 1) * batch):
        turn, index = divmod(place, sequences)
        # Far apart, so that another seed's passes are not this one's later passes.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        indices.append(int(torch.randperm(sequences, generator=generator)[index]))
    return indices
