"""Loading other weights into a running engine: a checkpoint of the same ranks and shapes replaces the old.

vLLM's `reload_weights` empties every layer before it reads the first tensor, and what fails after that leaves them
half filled. So the new checkpoint is read through and compared with the engine's layers before: the loader that
does so is registered under a load format of its own, which PIFA engines are given once their model is built.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import LoadConfig, ModelConfig, VllmConfig, replace
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from pifa_vllm.checkpoint import Checkpoint
from pifa_vllm.errors import CheckpointError
from pifa_vllm.plugin.linear import PIFALinearMethod
from pifa_vllm.plugin.view import CheckpointView, open_checkpoint

_FORMAT = "pifa_reload"
_ADVICE = "A running engine takes checkpoints of the same ranks and shapes only; start another one for this."


def guard_reloads(vllm_config: VllmConfig) -> None:
    """Have the engine that is being built check what it is told to reload."""
    # The loader of the first load has its own reference to the old one.
    vllm_config.load_config = replace(vllm_config.load_config, load_format=_FORMAT)


@register_model_loader(_FORMAT)
class ReloadingLoader(DefaultModelLoader):
    """vLLM's loader of safetensors, which refuses a checkpoint before the engine gives up its old weights."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(self, model_config: ModelConfig, model: Module) -> Iterator[tuple[str, Tensor]]:
        """Check, then read.

        Raises:
            CheckpointError: naming tensor, expected and found; the engine then goes on serving what it has.
        """
        used = [getattr(module, "quant_method", None) for module in model.modules()]
        methods = [method for method in used if isinstance(method, PIFALinearMethod)]
        if methods:  # none: a dense model that drafts for a PIFA one
            view = methods[0].view
            try:
                check_reload(view, methods, model_config.model)
            except Exception:
                # vLLM has noted the new path already; a later reload without a path means the old one.
                model_config.model = view.model
                raise
            view.model = model_config.model
        weights: Iterator[tuple[str, Tensor]] = super().get_all_weights(model_config, model)
        return weights


def check_reload(view: CheckpointView, methods: list[PIFALinearMethod], model: str) -> None:
    """Compare a checkpoint with the layers that are to receive it, and read it through.

    Args:
        view: of the checkpoint that the engine serves.
        methods: of its layers.
        model: directory or name of the checkpoint.

    Raises:
        CheckpointError: naming tensor, expected and found.
    """
    with view.loading():
        pass  # no earlier one failed
    checkpoint = open_checkpoint(model, None, view.downloads)
    _check_ranks(view, checkpoint)
    _check_shapes(view, checkpoint)
    checkpoint.verify()
    for method in methods:
        # Several tensor-parallel ranks hold shares whose sizes follow from the pivot rows.
        rows = [
            torch.arange(s.size) if s.rank is None else checkpoint.pivots(view.stored_name(s.name))
            for s in method.shards
        ]
        method.layout.rows(rows)


def _check_ranks(view: CheckpointView, checkpoint: Checkpoint) -> None:
    expected = {view.stored_name(name): rank for name, rank in view.ranks.items()}
    found = checkpoint.config.ranks
    if checkpoint.config.factors != view.kind:
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: quantization_config.factors: expected {view.kind}, found "
            f"{checkpoint.config.factors}. {_ADVICE}"
        )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{checkpoint.directory / 'config.json'}: quantization_config.ranks[{name!r}]: expected "
                f"{expected.get(name, 'none, as the module is dense')}, found "
                f"{found.get(name, 'none, as the module is dense')}. {_ADVICE}"
            )


def _check_shapes(view: CheckpointView, checkpoint: Checkpoint) -> None:
    if view.shapes is None:
        return
    found = {name: entry.shape for name, entry in checkpoint.shards.entries.items()}
    for name in sorted(view.shapes.keys() | found.keys()):
        if view.shapes.get(name) != found.get(name):
            expected, shape = (s and list(s) for s in (view.shapes.get(name), found.get(name)))
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name}: expected {expected or 'no such tensor'}, found "
                f"{shape or 'none'}. {_ADVICE}"
            )
