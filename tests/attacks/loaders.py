"""What the attacks are tried against; each function is called in a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pifa_vllm
from pifa_vllm.errors import PifaError

LOADERS = ("verify", "transformers", "vllm")


def loader(name: str, good: Path) -> Callable[[Path], None]:
    """Import what a loader needs for a good checkpoint, so that it is there before anything is forked."""
    return {"verify": _verify, "transformers": _transformers, "vllm": _vllm}[name](good)


def _verify(good: Path) -> Callable[[Path], None]:
    from pifa_vllm.cli import main

    _transformers(good)

    def verify(directory: Path) -> None:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = main(["verify", str(directory)])
        if code != 0:
            raise PifaError(errors.getvalue().removeprefix("error: ").strip())

    return verify


def _transformers(good: Path) -> Callable[[Path], None]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    assert pifa_vllm.__version__
    assert all((modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3))
    AutoTokenizer.from_pretrained(good)
    return lambda directory: AutoModelForCausalLM.from_pretrained(directory) and None


def _vllm(good: Path) -> Callable[[Path], None]:
    # An engine in the process that is measured. Not on import: other tests' servers would inherit it.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "CRITICAL"}
    from vllm import LLM, EngineArgs

    from tests.plugin.engines import OPTIONS

    EngineArgs(model=str(good), **OPTIONS).create_engine_config()

    def start(directory: Path) -> None:
        # Without weights being read; what passes this is loaded.
        EngineArgs(model=str(directory), **OPTIONS).create_engine_config()
        LLM(str(directory), **OPTIONS)

    return start
