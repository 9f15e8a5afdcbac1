"""Is this dense model the one that a checkpoint was compressed from?"""

from __future__ import annotations

from pathlib import Path

import torch

from pifa_vllm.checkpoint import Checkpoint, read_json
from pifa_vllm.checkpoint.files import quoted
from pifa_vllm.checkpoint.schema import COEFFICIENTS, PIVOT_ROWS, PIVOT_WEIGHT
from pifa_vllm.checkpoint.tokenizer import check_same_tokenizer
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.errors import UnsupportedModelError

# What may differ between a model and what became of it.
_OTHERWISE = {
    "_name_or_path",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


def check_parent(checkpoint: Checkpoint, teacher: DenseModel) -> None:
    """Check that a checkpoint is what compression makes of a dense model.

    Compression leaves embeddings, norms and biases as they are, up to the rounding of storage: they tell a model
    from its siblings, which share its configuration and tokenizer. What earlier healing has trained is left out.

    Args:
        checkpoint: the compressed model.
        teacher: the dense model.

    Raises:
        CheckpointError: if a tensor or a tokenizer cannot be read.
        UnsupportedModelError: naming the first setting, shape, token or tensor that differs.
    """
    directory = checkpoint.directory
    _check_configs(directory, teacher)
    for name, module in checkpoint.modules.items():
        entry = teacher.shards.entry(f"{name}.weight")
        if entry.shape != (module.m, module.n):
            raise UnsupportedModelError(
                f"{entry.file}: tensor {name}.weight: expected {[module.m, module.n]}, which is what "
                f"{directory} has compressed, found {list(entry.shape)}. --teacher is the model it was made from."
            )
    check_same_tokenizer(directory, teacher.directory)
    for name in _untouched(checkpoint):
        if name not in teacher.shards:
            continue
        kept = checkpoint.shards.load(name)
        if not torch.equal(kept, teacher.shards.load(name).to(kept.dtype)):
            raise UnsupportedModelError(
                f"{teacher.shards.entry(name).file}: tensor {name}: expected the values that {directory} has, "
                "since compression leaves them as they are, found others. --teacher is the model it was made from."
            )


def _check_configs(directory: Path, teacher: DenseModel) -> None:
    kept, found = read_json(directory / "config.json"), teacher.raw_config
    for key in sorted((kept.keys() | found.keys()) - _OTHERWISE):
        if kept.get(key) != found.get(key):
            raise UnsupportedModelError(
                f"{teacher.directory / 'config.json'}: {key}: expected {quoted(kept.get(key))} as in {directory}, "
                f"found {quoted(found.get(key))}. --teacher is the model it was made from."
            )


def _untouched(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that neither compression nor earlier healing has changed."""
    earlier = checkpoint.config.provenance.get("healing") or []
    healed = bool(earlier)
    embeddings = any(run.get("options", {}).get("embeddings") for run in earlier if isinstance(run, dict))
    found = []
    for name in checkpoint.shards.entries:
        module, _, suffix = name.rpartition(".")
        if module in checkpoint.modules and suffix in (PIVOT_WEIGHT, COEFFICIENTS, PIVOT_ROWS):
            continue
        if healed and (name.startswith("model.layers.") or module.endswith("norm")):
            continue
        if embeddings and module in ("model.embed_tokens", "lm_head"):
            continue
        found.append(name)
    return found
