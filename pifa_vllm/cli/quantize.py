"""`pifa-vllm quantize`: a PIFA checkpoint in, the same with quantized factors out."""

from __future__ import annotations

import argparse
from pathlib import Path

from pifa_vllm.cli.compress import add_calibration, add_factors, add_running, compress, factors_from

_EPILOG = """\
Ranks stay as they are, gate and up are stored by pivot columns, and dense modules are quantized, too. On the text
the errors of rounding are weighed and corrected. Killed at any moment, the same command goes on at the first
unfinished layer. The output directory appears whole at the end, and loads wherever the input does.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "quantize",
        description="Quantize the factors of a PIFA checkpoint to 8 or 4 bits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="PIFA checkpoint directory")
    parser.add_argument("output", type=Path, help="checkpoint directory to create")
    add_factors(parser.add_argument_group("size"), required=True)
    add_calibration(parser.add_argument_group("calibration"))
    add_running(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize; 0 when the checkpoint is there."""
    from pifa_vllm.checkpoint import read_config
    from pifa_vllm.compression.allocation import uniform
    from pifa_vllm.compression.options import CompressOptions

    taken = "model output calibration text_field samples length seed device activation_dtype chunk_tokens"
    options = CompressOptions(
        method="quantize",
        density=uniform(read_config(args.model).density),
        factors=factors_from(args),
        **{name: getattr(args, name) for name in taken.split()},
    )
    return compress(args, options)
