"""`pifa-vllm bench quality`: what compression costs the model, by variant and density."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pifa_vllm.cli.bench_options import plot_file

_EPILOG = """\
PLAN is a YAML file:

    model: smollm2-135m                              # dense; paths are as seen from here
    texts: {development: raw-development.txt}        # UTF-8, none of it calibrated on
    seqlen: 1024
    max_windows: 64                                  # of each text
    densities: [0.8, 0.5]
    seeds: [0]
    calibration: {calibration: raw-calibration.txt, samples: 16, length: 1024}
    against: mpifa-exact
    variants:
      mpifa-exact: {compress: {}, seeds: {0.8: [0, 1, 2]}}  # options of `pifa-vllm compress`
      mpifa: {compress: {method: mpifa}}
      healed: {directory: "runs/healed-{density}"}   # what is there already
      int8: {rival: round, bits: 8, group: 64}       # or gptq; magnitude, wanda, sparsegpt: 2 of 4

Each window's loss, its KL divergence from the dense model and the share of tokens with the same first choice are
kept in the results; `bench table` prints means and standard errors of differences, window by window. Checkpoints
and the dense model's figures are kept in the work directory, rows in the results; neither is computed again.
"""


def add_quality(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add its parser to those of `bench`."""
    parser = kinds.add_parser(
        "quality",
        help="loss, KL divergence and first choices against the dense model, by variant and density",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN", help="YAML file, see below")
    add("--output", type=Path, required=True, metavar="JSON", help="results")
    add("--work-dir", type=Path, required=True, metavar="DIR", help="for the checkpoints")
    add("--only", metavar="VARIANT,...", help="make and measure only these in this run")
    add("--plot", type=plot_file, metavar="SVG", help="draw loss over FLOPs and over bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write, print the tables."""
    from pifa_vllm.bench.quality.losses import plot, tables
    from pifa_vllm.bench.quality.measure import quality
    from pifa_vllm.bench.quality.plan import read_plan
    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.errors import PifaError

    plan = read_plan(args.plan)
    only = args.only.split(",") if args.only else None
    if unknown := set(only or ()) - set(plan.variants):
        raise PifaError(
            f"--only: expected some of {', '.join(plan.variants)}, found {', '.join(sorted(unknown))}."
        )
    results = quality(
        plan,
        args.output,
        args.work_dir,
        only=only,
        command=command_line(sys.argv),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.plot:
        plot(results, args.plot)
    print(*tables(results), sep="\n\n")
    return 0
