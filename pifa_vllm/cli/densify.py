"""`pifa-vllm densify`: a compressed model back as an ordinary dense one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "densify",
        description="Write the dense model that a PIFA checkpoint stands for. It computes what the checkpoint "
        "computes, in the size of the original, and needs neither this package nor its plugin.",
    )
    parser.add_argument("model", type=Path, help="PIFA checkpoint")
    parser.add_argument("output", type=Path, help="directory to create")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the dense model."""
    from rich.console import Console
    from rich.progress import Progress

    from pifa_vllm.checkpoint import densify

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=None)
        densify(
            args.model,
            args.output,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{args.output}: dense model of {args.model}")
    return 0
