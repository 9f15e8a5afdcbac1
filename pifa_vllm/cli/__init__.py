"""The `pifa-vllm` command line: one module per command, imported only when its command is invoked.

A command's module has `add_parser(subparsers)`, which adds its parser and sets `run` on it by `set_defaults`,
and `run(args) -> int`, the exit code. Modules import torch and the like inside `run`, so that every `--help`
is quick. A parser that sets `accepts_extra=True` gets the arguments it does not know as `args.extra`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from pifa_vllm import __version__
from pifa_vllm.errors import PifaError

COMMANDS = {
    "compress": "compress a model by MPIFA, or by one of the baselines",
    "heal": "train a compressed model towards its dense parent's predictions",
    "quantize": "quantize a compressed model's factors to 8 or 4 bits",
    "inspect": "show a compressed model's modules, ranks, densities, bytes and provenance",
    "verify": "check a compressed model down to the last value",
    "eval": "measure perplexity, by transformers, by vLLM or by both",
    "serve": "start vLLM's OpenAI server on a compressed model",
    "chat": "talk to a running server",
    "densify": "write a compressed model back as an ordinary dense one",
    "bench": "measure, and write the results as JSON",
    "demo": "compress a small model, compare, serve it and talk to it",
}
# Which `make setup` leaves out, and only `bench` needs.
_BENCH_PACKAGES = ("matplotlib", "triton")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code: 0, or 1 after an error that the user can act on, 130 after Ctrl-C, 141 when the reader
        of a pipe has left. Wrong usage leaves through argparse with 2, other errors with their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, subparsers = _parser(arguments)
    args, extra = parser.parse_known_args(arguments)
    if extra and not getattr(args, "accepts_extra", False):
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(extra)}")
    args.extra = extra
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # here, so that a reader who has left is noticed here
        return code
    except PifaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in _BENCH_PACKAGES:
            raise
        print(f"error: this needs {error.name} (pip install 'pifa-vllm[bench]').", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(
    arguments: list[str],
) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="pifa-vllm", description="Compress LLaMA models by MPIFA and serve them with vLLM."
    )
    parser.add_argument("--version", action="version", version=f"pifa-vllm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    invoked = next((a for a in arguments if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == invoked:
            importlib.import_module(f"pifa_vllm.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, subparsers
