"""`pifa_vllm.heal`: from Python what `pifa-vllm heal` is on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pifa_vllm.compression.report.schema import HealingReport
from pifa_vllm.healing.options import HealOptions
from pifa_vllm.healing.run import Healing


def heal(
    model: str | Path,
    output: str | Path,
    *,
    teacher: str | Path,
    tokens: int,
    calibration: str | Path = HealOptions.calibration,
    lr: float = HealOptions.lr,
    seed: int = HealOptions.seed,
    device: str = HealOptions.device,
    **options: Any,
) -> HealingReport:
    """Train a PIFA checkpoint towards its dense parent's predictions, with ranks and pivots as they are.

    Factors and norms learn by distillation (arXiv 1503.02531); a share of the text judges, and the best state is
    what is published. Killed at any moment, the same call goes on where it last looked at that text; `output`
    appears whole or not at all, and loads wherever `model` does.

    Args:
        model: PIFA checkpoint directory.
        output: checkpoint directory to create.
        teacher: the dense model directory that `model` was compressed from.
        tokens: training tokens to see; passes over the text follow one another until there are as many.
        calibration: text file, .jsonl file, dataset name ("wikitext2", "c4", ...), or "self", the dense model's own
            samples.
        lr: peak learning rate.
        seed: of the order of the sequences, and of "self".
        device: where to compute: "cpu", "cuda", "cuda:1", ...
        options: the rest of `pifa_vllm.healing.options.HealOptions`, such as length or batch.

    Returns:
        What was done: tokens, losses before and after, seconds, memory.

    Raises:
        PifaError: if an option, a model, the text or the output directory rules the run out, or the held-out text
            is predicted no better after it; the message says what was expected and what was found.
    """
    given = {
        "teacher": Path(teacher),
        "tokens": tokens,
        "calibration": str(calibration),
        "lr": lr,
        "seed": seed,
        "device": device,
        **options,
    }
    chosen = HealOptions(model=Path(model), output=Path(output), **given)
    arguments = ", ".join(f"{x}={str(v) if x == 'teacher' else v!r}" for x, v in given.items())
    command = f"pifa_vllm.heal({str(model)!r}, {str(output)!r}, {arguments})"
    return Healing(chosen, lambda line: print(line, file=sys.stderr)).run(command)
