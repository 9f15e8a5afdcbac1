"""`pifa-vllm verify`: everything about a checkpoint that can be checked without its original."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "verify",
        description="Check a PIFA checkpoint: config.json and the shards' headers against one another, every "
        "value, the architecture's tensors, and the tokenizer. The first violation ends it with exit code 1.",
    )
    parser.add_argument("model", type=Path, help="PIFA checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, printing a line per step that passed."""
    from pifa_vllm.checkpoint import Checkpoint, load_tokenizer
    from pifa_vllm.hf import check_architecture

    checkpoint = Checkpoint.open(args.model)
    entries = checkpoint.shards.entries
    files = {entry.file for entry in entries.values()}
    counts = f"{len(checkpoint.modules)} compressed modules, {len(entries)} tensors, {len(files)} shards"
    print(f"OK  headers       {counts}")
    checkpoint.verify()
    print("OK  values        all finite; pivots increasing and in range")
    print(f"OK  architecture  {check_architecture(checkpoint)} has these tensors, and no others")
    print(f"OK  tokenizer     {len(load_tokenizer(args.model))} tokens")
    return 0
