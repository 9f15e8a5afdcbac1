"""`pifa_vllm.load`: a model directory, PIFA or dense, as a transformers model, or an error that says why not."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from pifa_vllm.checkpoint import Shards
from pifa_vllm.checkpoint.files import reason
from pifa_vllm.errors import CheckpointError, PifaError

# Logits that are held at once, in float32: 64 MiB.
_LOGITS = 2**24


def positions_at_once(vocabulary: int) -> int:
    """How many positions' logits are made at a time: a whole batch of them would take gigabytes.

    Args:
        vocabulary: numbers per position.
    """
    return max(1, _LOGITS // vocabulary)


def load(directory: str | Path, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a checkpoint for `generate`: PIFA layers, not reconstructed weights (arXiv 2501.19090, section 3).

    As `AutoModelForCausalLM.from_pretrained`, which does as well once `pifa_vllm` is imported, with three
    differences: only a local directory is read, no code from it is run, and a tensor that is missing is an error,
    where transformers would fill it with random numbers.

    Args:
        directory: what `compress` wrote, or a dense model with safetensors weights.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: where the model shall be: "cpu", "cuda", "cuda:1", ...

    Returns:
        The causal language model, in evaluation mode. It maps token ids, int64 [batch, tokens], to `.logits`
        [batch, tokens, vocabulary] in the model's dtype.

    Raises:
        CheckpointError: if the directory is not there, is damaged or incomplete, holds a value that is not finite
            in `dtype`, or transformers makes no model of it.
        PifaError: if torch cannot use the device.
    """
    directory = Path(directory)
    Shards(directory)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory}: transformers cannot load this model ({reason(error)})."
        ) from error
    if found["missing_keys"]:
        # transformers has filled them at random, with no more than a warning.
        raise CheckpointError(
            f"{directory}: tensor {min(found['missing_keys'])} is missing; {type(model).__name__} expects it."
        )
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        # AssertionError: what torch raises where it was built without the device.
        raise PifaError(
            f"--device: expected a device that torch can use, found {device!r} ({reason(error)})."
        ) from error
