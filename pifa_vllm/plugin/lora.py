"""LoRA adapters on a PIFA model: they must be made for it, and must not leak into requests without one.

vLLM has faults in each respect, in models of every kind. They are put right only in engines that serve a
PIFA model:

- Of an adapter it checks the last parts of the modules' names. A narrower model's adapter is padded with zeros,
  and a layer that the model does not have is passed over, without a word. The one name by which the LoRA
  worker reads adapters is rebound to a subclass that compares names and shapes first.
- Before 0.32 it passes over ranks and scales of single modules (`rank_pattern`, `alpha_pattern`), too: refused.
- On CPUs a request without an adapter has the index -1, which `lora_ops` takes for the last adapter: as soon as
  every slot is taken, such requests get another user's adapter (vllm-project/vllm#48421). There a trial finds the
  fault, and the ops are rebound to ones that multiply such a request's activations by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.lora import worker_manager
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper import punica_cpu

from pifa_vllm.checkpoint import Checkpoint, read_json
from pifa_vllm.checkpoint.shards import read_header
from pifa_vllm.errors import CheckpointError, UnsupportedModelError

_OPS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")

# id of an engine's LoRA configuration to that configuration, which keeps the id its own, and the engine's check.
_engines: dict[int, tuple[object, Callable[[Path], None]]] = {}


def guard_adapters(vllm_config: VllmConfig, open_checkpoint: Callable[[], Checkpoint]) -> None:
    """Make the engine that is being built refuse adapters that were not made for its model.

    Args:
        vllm_config: of the engine, with a `lora_config`.
        open_checkpoint: opens the checkpoint that it serves.
    """
    lora = vllm_config.lora_config
    pooling = vllm_config.model_config.runner_type == "pooling"
    _engines[id(lora)] = (lora, lambda adapter: check_adapter(adapter, open_checkpoint(), base=pooling))
    worker_manager.PEFTHelper = _CheckedPEFTHelper
    if not spares_base_requests():
        for name in _OPS:
            op = _sparing(getattr(lora_ops, name))
            # The prefill ops call them where they are defined, the wrapper of the decoding ones by its own names.
            setattr(lora_ops, name, op)
            setattr(punica_cpu, name, op)


def check_adapter(adapter: Path, checkpoint: Checkpoint, *, base: bool = False) -> None:
    """Compare the names and shapes of a peft adapter with the linear layers of a model.

    Adapters without safetensors, and tensors that belong to no linear layer, are left to vLLM.

    Args:
        adapter: a directory as `PeftModel.save_pretrained` writes it.
        checkpoint: of the model that it is to be used with.
        base: whether it may have been made for the model without its head, whose modules lack "model.".

    Raises:
        CheckpointError: naming file, tensor, expected and found.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return
    sizes = _linear_layers(checkpoint)
    parent = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    advice = (
        f"The adapter was made for {parent!r}; it fits {checkpoint.directory} only if that was compressed from "
        "the same model."
    )
    for name, entry in read_header(file):
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        module = name.removeprefix(_PREFIX).removesuffix(suffix or "")
        if suffix is None or module == "lm_head":
            continue
        size = sizes.get(module) or (sizes.get(f"model.{module}") if base else None)
        if size is None:
            raise CheckpointError(
                f"{file}: tensor {name}: expected a linear layer of {checkpoint.directory}, found {module!r}, "
                f"which is none. {advice}"
            )
        m, n = size
        fits = entry.shape[1:] == (n,) if suffix == _SUFFIXES[0] else entry.shape[:1] == (m,)
        if len(entry.shape) != 2 or not fits:
            expected = f"[rank, {n}]" if suffix == _SUFFIXES[0] else f"[{m}, rank]"
            raise CheckpointError(
                f"{file}: tensor {name}: expected {expected} for a layer of shape [{m}, {n}], found "
                f"{list(entry.shape)}. {advice}"
            )


def check_patterns(adapter: Path, known: set[str]) -> None:
    """Refuse an adapter whose modules have ranks or scales of their own, if vLLM would pass over them in silence.

    Args:
        adapter: a directory as `PeftModel.save_pretrained` writes it.
        known: the settings that vLLM reads; before 0.32 these are not among them.

    Raises:
        UnsupportedModelError: naming file and setting.
    """
    path = adapter / "adapter_config.json"
    config = read_json(path)
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name) and name not in known:
            raise UnsupportedModelError(
                f"{path}: {name}: expected none, as vLLM {vllm.__version__} scales all modules alike, found "
                f"{config[name]}. vLLM 0.32 reads it."
            )


def spares_base_requests() -> bool:
    """Try `bgmv_shrink` on a request without an adapter."""
    y = torch.zeros(1, 1)
    lora_ops.bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), y, torch.tensor([-1]), 1.0)
    return not bool(y.any())


def _linear_layers(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Module name to [m, n], dense ones included."""
    entries = checkpoint.shards.entries
    dense = {name.removesuffix(".weight"): e.shape for name, e in entries.items() if name.endswith(".weight")}
    return {name: shape for name, shape in (dense | checkpoint.linear).items() if len(shape) == 2}


def _sparing(op: Callable[..., None]) -> Callable[..., None]:
    @wraps(op)
    def applied(
        inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, *args: Any, **options: Any
    ) -> None:
        op(inputs.masked_fill((indices < 0).unsqueeze(-1), 0), weights, output, indices, *args, **options)

    return applied


class _CheckedPEFTHelper(PEFTHelper):
    """vLLM's reader of adapter_config.json; in engines of other models nothing more."""

    @classmethod
    def from_local_dir(cls, lora_path: str, *args: Any) -> PEFTHelper:
        found = super().from_local_dir(lora_path, *args)
        found.directory = Path(lora_path)
        return found

    def validate_legal(self, lora_config: Any) -> None:
        super().validate_legal(lora_config)
        if engine := _engines.get(id(lora_config)):
            check_patterns(self.directory, {field.name for field in fields(PEFTHelper)})
            engine[1](self.directory)
