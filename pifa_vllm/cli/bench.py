"""`pifa-vllm bench`: the measurements behind the README's figures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pifa_vllm.cli.bench_e2e import add_e2e
from pifa_vllm.cli.bench_options import densities_of, plot_file
from pifa_vllm.cli.bench_overhead import add_overhead
from pifa_vllm.cli.bench_quality import add_quality
from pifa_vllm.cli.bench_speculative import add_speculative


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("bench", description="Measure, and write the results as JSON.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    add_quality(kinds)
    layer = kinds.add_parser("layer", help="one layer: PIFA, dense, plain low rank, the reference's forward")
    add = layer.add_argument
    add("--shapes", default="llama2-7b", help="model names, or sizes of square layers (default: %(default)s)")
    add("--tokens", default="1,4,16,64,256,1024", help="(default: %(default)s)")
    add("--density", default="0.5", help="(default: %(default)s)")
    add("--dtype", default="float32,bfloat16", help="(default: %(default)s)")
    add("--output", type=Path, required=True, metavar="JSON", help="results")
    add("--plot", type=plot_file, metavar="SVG", help="draw the speed-ups")
    layer.set_defaults(run=run_layer)
    add_e2e(kinds)
    add_overhead(kinds)
    add_speculative(kinds)
    gpu = kinds.add_parser("gpu", help="check the Triton kernels on this machine's GPU, and time its layers")
    gpu.add_argument("--output", type=Path, default=Path("gpu-check.json"), metavar="JSON", help="results")
    gpu.set_defaults(run=run_gpu)
    ranks = kinds.add_parser("ranks", help="count what each tensor-parallel rank holds and sends")
    ranks.add_argument("--models", default="llama2-70b,llama2-7b", help="(default: %(default)s)")
    ranks.add_argument("--density", default="0.5", help="(default: %(default)s)")
    ranks.add_argument("--output", type=Path, required=True, metavar="JSON", help="results")
    ranks.set_defaults(run=run_ranks)
    predict = kinds.add_parser("predict", help="the cost model's times of the Triton kernels on common GPUs")
    predict.add_argument("--output", type=Path, required=True, metavar="JSON", help="results")
    predict.set_defaults(run=run_predict)
    cubins = kinds.add_parser("cubins", help="compile the Triton kernels for NVIDIA GPUs, without one")
    cubins.add_argument("--output", type=Path, required=True, metavar="JSON", help="registers, spills, ...")
    cubins.set_defaults(run=run_cubins)
    host = kinds.add_parser(
        "host", help="what a call of the Triton kernels costs the processor, without a GPU"
    )
    host.add_argument("--output", type=Path, required=True, metavar="JSON", help="microseconds")
    host.set_defaults(run=run_host)
    table = kinds.add_parser("table", help="print the results of a benchmark as Markdown")
    table.add_argument("results", type=Path, metavar="JSON")
    table.set_defaults(run=run_table)


def run_layer(args: argparse.Namespace) -> int:
    """Measure layers on the CPU and write."""
    import torch

    from pifa_vllm.bench.layer.measure import ceilings, measure, to_json
    from pifa_vllm.bench.layer.report import plot, tables
    from pifa_vllm.bench.machine import describe_machine
    from pifa_vllm.bench.shapes import SHAPES, LayerShape
    from pifa_vllm.checkpoint.atomic import replace_text
    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.errors import PifaError
    from pifa_vllm.ops.cpu import load

    shapes: list[LayerShape] = []
    for name in args.shapes.split(","):
        if name.isdecimal() and int(name) > 0:
            shapes.append(LayerShape(f"{name} x {name}", int(name), (int(name),)))
        elif name in SHAPES:
            shapes += SHAPES[name]
        else:
            raise PifaError(f"--shapes: expected sizes or some of {', '.join(SHAPES)}, found {name!r}.")
    densities = densities_of("--density", args.density)
    if not all(x.isdecimal() and int(x) > 0 for x in args.tokens.split(",")):
        raise PifaError(f"--tokens: expected numbers of 1 or more and commas, found {args.tokens!r}.")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if unknown := set(args.dtype.split(",")) - set(dtypes):
        raise PifaError(f"--dtype: expected some of {', '.join(dtypes)}, found {', '.join(sorted(unknown))}.")
    if not load():
        raise PifaError("bench layer measures the CPU kernel, which could not be compiled (see above).")

    machine = describe_machine() | {"ceilings": ceilings()}
    rows = []
    for shape in shapes:
        for density in densities:
            for tokens in map(int, args.tokens.split(",")):
                found = list(measure(shape, tokens, density, [dtypes[x] for x in args.dtype.split(",")]))
                rows += found
                # After each case: what was measured outlives an interruption.
                results = to_json(rows, machine, command_line(sys.argv))
                replace_text(args.output, json.dumps(results, indent=1) + "\n")
                times = ", ".join(f"{r.implementation} {r.dtype} {r.ms:.2f}" for r in found)
                print(f"{shape.name}, density {density:g}, {tokens} tokens, ms: {times}", flush=True)
    # The ceilings once more: what else the machine does may have changed.
    machine["ceilings_after"] = ceilings()
    replace_text(args.output, json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)
    print(*tables(results), sep="\n\n")
    return 0


def run_gpu(args: argparse.Namespace) -> int:
    """Check and time on the GPU."""
    from pifa_vllm.bench.gpu.check import gpu_check

    gpu_check(args.output)
    return 0


def run_ranks(args: argparse.Namespace) -> int:
    """Count and write."""
    from pifa_vllm.bench.layer.ranks import results, share_table
    from pifa_vllm.bench.shapes import SHAPES
    from pifa_vllm.checkpoint.atomic import replace_text
    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.errors import PifaError

    models = args.models.split(",")
    if unknown := set(models) - set(SHAPES):
        raise PifaError(
            f"--models: expected some of {', '.join(SHAPES)}, found {', '.join(sorted(unknown))}."
        )
    (density,) = densities_of("--density", args.density)
    found = results(models, density, command_line(sys.argv))
    replace_text(args.output, json.dumps(found, indent=1) + "\n")
    print(*(f"{model}\n\n{share_table(found, model)}" for model in models), sep="\n\n")
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """Write what the cost model says."""
    from pifa_vllm.bench.gpu.cost_model import write

    write(args.output)
    return 0


def run_cubins(args: argparse.Namespace) -> int:
    """Compile and write."""
    from pifa_vllm.bench.gpu.cubins import cubins

    cubins(args.output, say=lambda line: print(line, flush=True))
    return 0


def run_host(args: argparse.Namespace) -> int:
    """Measure and write."""
    from pifa_vllm.bench.gpu.host import write
    from pifa_vllm.cli.compress import command_line

    write(args.output, command_line(sys.argv))
    return 0


def run_table(args: argparse.Namespace) -> int:
    """Print the tables."""
    from pifa_vllm.bench.layer.report import tables as layer_tables
    from pifa_vllm.bench.quality.report import cost_table, perplexity_table
    from pifa_vllm.checkpoint import read_json
    from pifa_vllm.errors import PifaError

    results = read_json(args.results)
    try:
        if results.get("kind") == "e2e":
            from pifa_vllm.bench.served.report import memory_table, speed_table

            tables = [speed_table(results), memory_table(results)]
        elif results.get("kind") == "speculative":
            from pifa_vllm.bench.served.speculative_report import break_even_table, speculative_table

            tables = [speculative_table(results), break_even_table()]
        elif results.get("kind") == "quality":
            from pifa_vllm.bench.quality.losses import tables as losses

            tables = list(losses(results))
        elif "kind" in results:
            # Not at the top: it needs Triton.
            from pifa_vllm.bench.gpu.cost_model import layer_table

            densities = sorted({row["density"] for row in results["rows"]})
            tables = [layer_table(results, density) for density in densities]
        elif "ms" in results["rows"][0]:
            tables = layer_tables(results)
        else:
            tables = [perplexity_table(results), cost_table(results)]
    except (IndexError, KeyError, StopIteration, TypeError) as error:
        raise PifaError(
            f"{args.results}: expected the results of a `pifa-vllm bench` command, found none ({error!r})."
        ) from error
    print(*tables, sep="\n\n")
    return 0
