"""`pifa-vllm bench`: the measurements behind the README's figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_EPILOG = """\
Options that `bench quality` does not know go to `pifa-vllm compress`, such as --calibration, --samples, --length
and --seed. Checkpoints are kept in the work directory, rows in the results; neither is computed again.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("bench", description="Measure, and write the results as JSON.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    quality = kinds.add_parser(
        "quality",
        help="perplexity and cost of compression, by method and density",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = quality.add_argument
    add("model", type=Path, help="dense model directory")
    add("--text", type=Path, required=True, metavar="FILE", help="evaluation text")
    add("--output", type=Path, required=True, metavar="JSON", help="results")
    add("--work-dir", type=Path, required=True, metavar="DIR", help="for the checkpoints")
    add("--variants", default="svd,svd-llm,svd-llm-pifa,mpifa,mpifa-exact", help="(default: %(default)s)")
    add("--densities", default="0.8,0.6,0.5", help="(default: %(default)s)")
    add("--seqlen", type=int, default=2048, help="tokens per window (default: %(default)s)")
    add("--max-windows", type=int, default=8, help="evaluation windows (default: %(default)s)")
    quality.set_defaults(run=run, accepts_extra=True)
    table = kinds.add_parser("table", help="print the results of bench quality as Markdown")
    table.add_argument("results", type=Path, metavar="JSON")
    table.set_defaults(run=run_table)


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    from pifa_vllm.bench.quality import VARIANTS, quality
    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.errors import PifaError

    variants = args.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        raise PifaError(
            f"--variants: expected some of {', '.join(VARIANTS)}, found {', '.join(sorted(unknown))}."
        )
    try:
        densities = [float(x) for x in args.densities.split(",")]
    except ValueError as error:
        raise PifaError(f"--densities: expected numbers and commas, found {args.densities!r}.") from error
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise PifaError(f"--densities: expected numbers in (0, 1], found {density:g}.")
    quality(
        args.model,
        args.text,
        args.output,
        args.work_dir,
        variants=variants,
        densities=densities,
        compress_options=args.extra,
        seqlen=args.seqlen,
        max_windows=args.max_windows,
        command=command_line(sys.argv),
        say=lambda line: print(line, flush=True),
    )
    return 0


def run_table(args: argparse.Namespace) -> int:
    """Print the tables."""
    from pifa_vllm.bench.table import cost_table, perplexity_table
    from pifa_vllm.checkpoint import read_json
    from pifa_vllm.errors import PifaError

    results = read_json(args.results)
    try:
        tables = perplexity_table(results), cost_table(results)
    except (KeyError, StopIteration) as error:
        raise PifaError(
            f"{args.results}: expected the results of `pifa-vllm bench quality`, found none ({error!r})."
        ) from error
    print(*tables, sep="\n\n")
    return 0
