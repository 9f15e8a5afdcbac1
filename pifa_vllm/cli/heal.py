"""`pifa-vllm heal`: a PIFA checkpoint and its dense parent in, a better checkpoint of the same shape out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pifa_vllm.healing.options import HealOptions

_EPILOG = """\
A share of the text judges and is not trained on; the best state by it is published, and nothing is if the input
was better. Killed at any moment, the same command goes on where it last looked at that text. The output directory
appears whole at the end, and loads wherever the input does.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "heal",
        description="Train a PIFA checkpoint towards its dense parent's predictions, ranks and pivots fixed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="PIFA checkpoint directory")
    add("output", type=Path, help="checkpoint directory to create")
    add("--teacher", type=Path, required=True, metavar="DIR", help="the dense model it was compressed from")
    add("--tokens", type=int, required=True, metavar="N", help="training tokens to see, over all passes")

    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--calibration",
        default=HealOptions.calibration,
        metavar="SOURCE",
        help="text file, .jsonl file, dataset name (wikitext2, c4, ...), or self: the dense model's own samples "
        "(default: %(default)s)",
    )
    add(
        "--text-field",
        default=HealOptions.text_field,
        help="field of JSONL records and datasets (default: %(default)s)",
    )
    add("--length", type=int, default=HealOptions.length, help="tokens per sequence (default: %(default)s)")
    add(
        "--held-out",
        type=float,
        default=HealOptions.held_out,
        help="share that judges (default: %(default)s)",
    )
    add("--seed", type=int, default=HealOptions.seed, help="of the sequences' order (default: %(default)s)")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--lr", type=float, default=HealOptions.lr, help="peak learning rate of AdamW (default: %(default)s)")
    add("--batch", type=int, default=HealOptions.batch, help="sequences per step (default: %(default)s)")
    add("--warmup", type=float, default=HealOptions.warmup, help="share of the steps (default: %(default)s)")
    add(
        "--weight-decay",
        type=float,
        default=HealOptions.weight_decay,
        help="of the factors (default: %(default)s)",
    )
    add("--embeddings", action="store_true", help="train embedding and output head, too")

    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--device", default=HealOptions.device, help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of matrix products (default: bfloat16 on GPUs, float32 on CPUs; bfloat16 is faster on CPUs with AMX)",
    )
    add(
        "--every",
        type=int,
        metavar="STEPS",
        help="steps between looks, which save the state (default: ten looks)",
    )
    add(
        "--no-gradient-checkpointing",
        dest="gradient_checkpointing",
        action="store_false",
        help="keep all activations: a quarter less work, more memory",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Heal; 0 when the checkpoint is there."""
    from transformers.utils import logging

    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.cli.threads import use_threads
    from pifa_vllm.healing.run import Healing

    logging.disable_progress_bar()
    use_threads(args.threads)
    taken = (
        "model output teacher tokens calibration text_field length held_out seed lr batch warmup weight_decay "
        "embeddings device precision every gradient_checkpointing"
    )
    options = HealOptions(**{name: getattr(args, name) for name in taken.split()})
    Healing(options, lambda line: print(line, file=sys.stderr)).run(command_line(sys.argv))
    return 0
