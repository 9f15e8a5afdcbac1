"""`pifa-vllm compress`: a dense model directory in, a checkpoint out."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pifa_vllm.checkpoint import FactorFormat
    from pifa_vllm.compression.options import CompressOptions

_EPILOG = """\
The run prints its estimated memory, disk and time first (--dry-run prints them and stops). Killed at any moment,
the same command goes on at the first unfinished layer. The output directory appears whole at the end, with
compression_report.json and compression_report.html in it.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "compress",
        help="compress a model by MPIFA, or by one of the baselines",
        description="Compress a LLaMA-family model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face model directory with safetensors weights")
    add("output", type=Path, help="checkpoint directory to create")

    group = parser.add_argument_group("method")
    add = group.add_argument
    add(
        "--method",
        choices=("mpifa-exact", "mpifa", "svd-llm", "svd"),
        default="mpifa-exact",
        help="mpifa-exact: M as cross-fitted reduced-rank regression; mpifa: the paper's M (U, then V); svd-llm "
        "and svd: baselines (default: %(default)s)",
    )
    add(
        "--representation",
        choices=("pifa", "lowrank"),
        default="pifa",
        help="lowrank: budget by plain low rank's parameter count and save reconstructed dense weights, for "
        "evaluation (default: %(default)s)",
    )
    add(
        "--metric",
        choices=("inputs", "outputs"),
        help="measure a module's error on its calibration inputs, or also by what the loss makes of it "
        "(default: outputs for mpifa-exact, inputs for the others)",
    )
    add(
        "--mix",
        type=float,
        help="λ, the dense flow's share in M's target (default: 0.25 for mpifa, 1 for mpifa-exact)",
    )
    add(
        "--feedback",
        type=float,
        default=1.0,
        help="μ, the share of the residual stream's error that mpifa-exact asks o and down to undo "
        "(default: %(default)s)",
    )
    add(
        "--ridge",
        type=float,
        help="ridge of the solves, relative to the inputs' mean square (default: by method)",
    )

    group = parser.add_argument_group("size")
    add = group.add_argument
    add("--density", type=float, help="kept / dense parameters of the linear modules, in (0, 1]")
    add("--attention-density", type=float, metavar="DENSITY", help="density of attention modules")
    add("--mlp-density", type=float, metavar="DENSITY", help="density of MLP modules")
    add(
        "--allocation",
        choices=("uniform", "sensitivity"),
        help="give every module the density, or divide it by what each rank is worth to the dense model's loss "
        "(default: sensitivity for mpifa-exact with --density alone, else uniform)",
    )
    add(
        "--recipe",
        type=Path,
        help="YAML file with densities per module and layer, such as a checkpoint's recipe.yaml",
    )
    add("--tile", type=int, default=16, help="ranks are multiples of this (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="storage dtype (default: the model's)")
    add_factors(group)

    group = parser.add_argument_group("calibration")
    add = group.add_argument
    add_calibration(group)
    add(
        "--gradient-samples",
        type=int,
        metavar="N",
        help="of the sequences, how many the loss's gradients are taken on (default: all of them)",
    )

    add_running(parser)
    parser.set_defaults(run=run)


def add_factors(group: argparse._ArgumentGroup, *, required: bool = False) -> None:
    """Add how factors are quantized."""
    group.add_argument(
        "--factors",
        choices=("int8", "int4", "fp8"),
        required=required,
        help="quantize the linear modules: 8 bits, or 4 bits with coefficients in 8, or 8-bit floats "
        + ("" if required else "(default: none, in the storage dtype)"),
    )
    group.add_argument(
        "--group-size",
        type=int,
        choices=(0, 32, 64, 128, 256),
        help="numbers of a row that share a scale, 0 for all of them (default: 128 for int8, 32 for int4, 0 for "
        "fp8)",
    )


def add_calibration(group: argparse._ArgumentGroup) -> None:
    """Add where calibration text comes from, and how much of it."""
    add = group.add_argument
    add(
        "--calibration",
        default="self",
        metavar="SOURCE",
        help="text file, .jsonl file, dataset name (wikitext2, c4, ...), or self: the model's own samples "
        "(default: %(default)s)",
    )
    add("--text-field", default="text", help="field of JSONL records and datasets (default: %(default)s)")
    add("--samples", type=int, default=128, help="sequences (default: %(default)s)")
    add("--length", type=int, default=2048, help="tokens per sequence (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add where and how a run goes."""
    add = parser.add_argument_group("running").add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add(
        "--activation-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="storage of the calibration activations (default: %(default)s)",
    )
    add("--chunk-tokens", type=int, default=2048, help="tokens per forward pass (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the estimate and the ranks' summary, and stop")


def run(args: argparse.Namespace) -> int:
    """Compress; 0 when the checkpoint is there."""
    return compress(args, options_from(args))


def compress(args: argparse.Namespace, options: CompressOptions) -> int:
    """Run, or print what a run would take; 0 when that is done."""
    from transformers.utils import logging

    from pifa_vllm.cli.threads import use_threads
    from pifa_vllm.compression.pipeline import Compression
    from pifa_vllm.compression.progress import make_progress

    logging.disable_progress_bar()
    use_threads(args.threads)
    compression = Compression(options, make_progress(args.output))
    figures = compression.estimate()
    print(figures.text(), file=sys.stderr)
    print(compression.describe_ranks(), file=sys.stderr)
    if args.dry_run:
        plan = {
            "estimate": figures.to_json(),
            "density": compression.kept / sum(x.m * x.n for x in compression.linears),
            # Where the dense model's gradients choose them, they are not known yet.
            "ranks": None if compression.options.effective_allocation == "sensitivity" else compression.ranks,
        }
        print(json.dumps(plan, indent=1))
        return 0
    compression.run(command_line(sys.argv))
    return 0


def options_from(args: argparse.Namespace) -> CompressOptions:
    """Build the run's options.

    Raises:
        PifaError: if they contradict one another or are out of range.
    """
    from pifa_vllm.compression.allocation import load_recipe, uniform
    from pifa_vllm.compression.options import CompressOptions
    from pifa_vllm.errors import PifaError

    by_part = (args.attention_density, args.mlp_density)
    if args.recipe is not None:
        if args.density is not None or by_part != (None, None):
            raise PifaError("--recipe: holds all densities itself, expected no density option beside it.")
        density = load_recipe(args.recipe)
    elif args.density is not None:
        density = uniform(args.density, *by_part)
    elif None not in by_part:
        density = uniform(args.attention_density, *by_part)
    else:
        raise PifaError(
            "--density: expected a number in (0, 1] (or --recipe, or both of its parts), found none."
        )
    taken = (
        "model output method representation mix feedback ridge tile dtype calibration text_field samples "
        "length seed device activation_dtype chunk_tokens allocation metric gradient_samples"
    )
    options = {name: getattr(args, name) for name in taken.split()}
    return CompressOptions(density=density, factors=factors_from(args), **options)


def factors_from(args: argparse.Namespace) -> FactorFormat | None:
    """Say how factors are to be quantized.

    Raises:
        PifaError: if there is a size of groups and nothing that has any.
    """
    from pifa_vllm.compression.options import FACTORS
    from pifa_vllm.errors import PifaError

    if args.factors is None:
        if args.group_size is not None:
            raise PifaError(
                "--group-size: is of quantized factors, expected --factors beside it, found none."
            )
        return None
    kind = FACTORS[args.factors]
    if args.group_size is not None:
        kind = kind.model_copy(update={"group_size": args.group_size or None})
    return kind


def command_line(argv: list[str]) -> str:
    """Return the command as a user would type it again, whichever way it was started."""
    return shlex.join(["pifa-vllm", *argv[1:]])
