"""`pifa-vllm eval --tasks`: zero-shot tasks by lm-eval."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pifa_vllm.compression.report.schema import Evaluation
    from pifa_vllm.evaluate.tasks import TaskFigure


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only tasks need."""
    add = parser.add_argument_group("tasks").add_argument
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--task-dir", type=Path, metavar="DIR", help="further task definitions (YAML), whose code is trusted")
    add("--batch-size", type=int, default=8, help="sequences at a time, transformers (default: %(default)s)")


def run(args: argparse.Namespace) -> list[Evaluation]:
    """Evaluate and print.

    Returns:
        The figures as a compression report has them; `model` is still to be named.
    """
    from pifa_vllm.errors import EvaluationError
    from pifa_vllm.evaluate.tasks import run_tasks

    if args.batch_size < 1:
        raise EvaluationError(f"--batch-size: expected 1 or more, found {args.batch_size}.")
    engines = ("transformers", "vllm") if args.engine == "both" else (args.engine,)
    figures = [
        figure
        for engine in engines
        for figure in run_tasks(
            args.model,
            args.tasks.split(","),
            engine=engine,
            limit=args.limit,
            task_dir=args.task_dir,
            batch_size=args.batch_size,
            dtype=args.dtype,
            device=args.device,
            eager=args.eager,
        )
    ]
    if args.json:
        print(json.dumps([figure.to_dict() for figure in figures], indent=2, allow_nan=False))
    else:
        print(*map(_line, figures), sep="\n")
    return [_evaluation(figure, args.limit) for figure in figures]


def _line(figure: TaskFigure) -> str:
    spread = "" if figure.standard_error is None else f" ± {figure.standard_error:.4f}"
    return (
        f"{figure.task} {figure.metric} {figure.value:.4f}{spread}  ({figure.samples} items, "
        f"{figure.fewshot}-shot; {figure.engine}, {figure.dtype})"
    )


def _evaluation(figure: TaskFigure, limit: int | None) -> Evaluation:
    from pifa_vllm.compression.report.schema import Evaluation

    count = f"{'first ' if limit else ''}{figure.samples} items"
    return Evaluation(
        model="",
        metric=figure.metric,
        value=figure.value,
        data=f"{figure.task}, {count}, {figure.fewshot}-shot",
        engine=figure.engine,
        dtype=figure.dtype,
    )
