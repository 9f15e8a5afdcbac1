"""`pifa-vllm bench overhead`: the same checkpoint behind our server and behind bare vLLM."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

_COUNTS = {
    "--starts": (4, "of both servers"),
    "--turns": (40, "of single requests, per start"),
    "--requests": (10, "in each turn"),
    "--rounds": (30, "of throughput, per start"),
    "--at-once": (8, "requests together"),
    "--tokens": (32, "of each of those"),
}


def add_overhead(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add its parser to those of `bench`."""
    parser = kinds.add_parser(
        "overhead",
        help="what our server's layer costs beside bare vLLM",
        description="Start `pifa-vllm serve` and bare vLLM on the same checkpoint, and ask them in turn.",
        epilog="Options that `bench overhead` does not know go to both servers, such as --dtype.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="DIR", help="checkpoint directory")
    add("--output", type=Path, required=True, metavar="JSON", help="results")
    add("--name", help="of the model in the results (default: the directory's)")
    for option, (default, what) in _COUNTS.items():
        add(option, type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.set_defaults(run=run, accepts_extra=True)


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    from pifa_vllm_server.launch import parse_arguments

    from pifa_vllm.bench.served.overhead import Amounts, overhead
    from pifa_vllm.cli.cpu import set_cpu_defaults
    from pifa_vllm.errors import PifaError

    counts = {option: getattr(args, option.strip("-").replace("-", "_")) for option in _COUNTS}
    for option, count in counts.items():
        if count < 1:
            raise PifaError(f"{option}: expected 1 or more, found {count}.")
    # An exception, on whose way out the halted servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    set_cpu_defaults(parse_arguments(str(args.model), args.extra), args.extra)
    starts, *amounts = counts.values()
    summary = overhead(
        args.model,
        args.output,
        Amounts(*amounts),
        starts=starts,
        name=args.name or args.model.name,
        flags=args.extra,
    )
    print(json.dumps(summary, indent=1))
    return 0
