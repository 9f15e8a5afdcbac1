"""`pifa-vllm bench speculative`: compressed models as drafts for their dense parent."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_speculative(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add its parser to those of `bench`."""
    parser = kinds.add_parser(
        "speculative",
        help="compressed models as drafts: acceptance, and speed against the dense model alone",
        description="Decode prompts by the dense model alone and with each compressed one as its draft, in turn.",
        epilog="Drafts that the results have already are not measured again.",
    )
    add = parser.add_argument
    add("dense", type=Path, help="dense model directory")
    add("drafts", type=Path, nargs="+", metavar="DRAFT", help="PIFA checkpoint of it")
    add("--text", type=Path, required=True, metavar="FILE", help="held-out text, for half of the prompts")
    add("--output", type=Path, required=True, metavar="JSON", help="results")
    add("--draft-tokens", default="1,2,4", metavar="K,...", help="drafted per step (default: %(default)s)")
    add("--output-tokens", type=int, default=32, help="generated per prompt (default: %(default)s)")
    add("--rounds", type=int, default=2, help="(default: %(default)s)")
    add("--enforce-eager", action="store_true", help="without torch.compile")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    from pifa_vllm.bench.served.speculative import speculative
    from pifa_vllm.bench.served.speculative_report import speculative_table
    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.errors import PifaError

    numbers = args.draft_tokens.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise PifaError(
            f"--draft-tokens: expected numbers of 1 or more and commas, found {args.draft_tokens!r}."
        )
    for option in ("output_tokens", "rounds"):
        least = 2 if option == "output_tokens" else 1
        if getattr(args, option) < least:
            raise PifaError(
                f"--{option.replace('_', '-')}: expected {least} or more, found {getattr(args, option)}."
            )
    results = speculative(
        args.dense,
        args.drafts,
        args.text,
        args.output,
        draft_tokens=[int(number) for number in numbers],
        output_tokens=args.output_tokens,
        rounds=args.rounds,
        eager=args.enforce_eager,
        command=command_line(sys.argv),
        say=lambda line: print(line, flush=True),
    )
    print(speculative_table(results))
    return 0
