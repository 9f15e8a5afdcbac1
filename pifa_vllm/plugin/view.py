"""A checkpoint as an engine's layers see it: its modules' ranks, shapes and pivot rows under vLLM's names for them.

Nothing here imports vLLM. What it says of a checkpoint's surroundings is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from pifa_vllm.checkpoint import Checkpoint, PIFAConfig
from pifa_vllm.errors import CheckpointError
from pifa_vllm.plugin.layout import Shard

# What the names of all layers begin with in a model that drafts for another one (speculative decoding).
_DRAFT_PREFIX = "draft_model."


class CheckpointView:
    """What an engine serves.

    Attributes:
        ranks: module name, as vLLM calls it, to rank.
        kind: how linear modules are quantized, if they are.
        tensors: the names of all tensors in the checkpoint, as vLLM calls them; None where the model is not a
            local directory, and completeness is known only while loading.
        shapes: of the same, under the checkpoint's names.
        model: directory or name of the model.
        revision: of a name.
        on_hub: whether names are those of Hugging Face's hub, from which they can be downloaded here.
        downloads: folder to which that is done; None for the hub's own.
        failed: what ended a load midway, which leaves the layers in an undefined state.
    """

    def __init__(self, config: PIFAConfig) -> None:
        self.ranks = dict(config.ranks)
        self.kind = config.factors
        self.tensors: set[str] | None = None
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.model = ""
        self.revision: str | None = None
        self.on_hub = True
        self.downloads: str | None = None
        self.failed: str | None = None
        # vLLM's name of a module to the checkpoint's.
        self._names = {name: name for name in config.ranks}
        self._matched: set[str] = set()
        self._checkpoint: Checkpoint | None = None
        self._dense_checked = False

    def find(self, model: str, revision: str | None, *, on_hub: bool = True) -> None:
        """Look at a model; if it is local, check its headers and pivot rows and note its tensors.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        self.model, self.revision, self.on_hub = model, revision, on_hub
        directory = Path(model)
        if directory.is_dir():
            checkpoint = Checkpoint.open(directory)
            checkpoint.check_pivots()
            self.tensors = set(checkpoint.shards.entries)
            self.shapes = {name: entry.shape for name, entry in checkpoint.shards.entries.items()}

    def rename(self, renamed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Call modules and tensors as the model does that vLLM is about to build.

        Args:
            renamed: returns a dict under the model's names; without the keys that it has no name for.
        """
        self.ranks = renamed(self.ranks)
        self._names = renamed(self._names)
        if self.tensors is not None:
            self.tensors = set(renamed(dict.fromkeys(self.tensors)))

    def shards(self, prefix: str, packed: Mapping[str, Sequence[str]], *, has_bias: bool) -> list[Shard]:
        """Name the modules of one layer, several if vLLM fuses them (qkv_proj, gate_up_proj).

        vLLM's loader does not check for quantized models that nothing stays uninitialised. Here it is checked.

        Args:
            prefix: the layer's name.
            packed: the last part of a fused layer's name to those of its modules.
            has_bias: whether the layer has one.

        Raises:
            CheckpointError: if a local checkpoint lacks one of their tensors.
        """
        parent, dot, last = prefix.removeprefix(_DRAFT_PREFIX).rpartition(".")
        names = [f"{parent}{dot}{part}" for part in packed.get(last, [last])]
        shards = [Shard(name, self.ranks.get(name), kind=self.kind) for name in names]
        self._matched.update(names)
        for shard in shards:
            for suffix in (*shard.suffixes, *(["bias"] if has_bias else [])):
                if self.tensors is not None and f"{shard.name}.{suffix}" not in self.tensors:
                    raise CheckpointError(f"{shard.source(suffix)} is missing from the checkpoint.")
        return shards

    def check_all_matched(self) -> None:
        """Check, once a whole model is built, that every compressed module became a layer of it.

        Raises:
            CheckpointError: naming a module that did not.
        """
        unknown = sorted(self.ranks.keys() - self._matched)
        if unknown:
            raise CheckpointError(
                f"config.json: quantization_config.ranks names {len(unknown)} modules that are no linear "
                f"layers of the model as vLLM builds it, first {unknown[0]!r}; vLLM's are called like "
                f"{min(self._matched)!r}."
            )

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a compressed module that vLLM calls `name`."""
        return self._names[name]

    def is_readable(self) -> bool:
        """Tell whether the checkpoint can be opened here: what is in a bucket, only vLLM's loader reads."""
        on_hub = self.on_hub and "://" not in self.model
        return bool(self.model) and (on_hub or Path(self.model).is_dir())

    def checkpoint(self) -> Checkpoint:
        """Open the checkpoint, or its download, once.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        if self._checkpoint is None:
            self._checkpoint = open_checkpoint(self.model, self.revision, self.downloads)
        return self._checkpoint

    def pivot_rows(self, name: str, m: int) -> Tensor:
        """Read a module's pivot rows, int32 [r], ahead of loading: they decide what each rank allocates.

        Args:
            name: of the module, as vLLM calls it.
            m: outputs of the layer that vLLM builds for it.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        checkpoint, module = self.checkpoint(), self.stored_name(name)
        entry = checkpoint.modules[module]
        if entry.m != m:
            raise CheckpointError(
                f"layer {name}: expected {m} outputs as config.json says, found {entry.m} in the checkpoint."
            )
        return checkpoint.pivots(module)

    def check_dense(self, dtype: torch.dtype) -> None:
        """Check, once the first load has read them, the tensors that are none of the PIFA layers'.

        vLLM gives them to layers that check nothing, so they are read again, from the disk's cache. Reloads are
        read through before.

        Args:
            dtype: that the model is served in.

        Raises:
            CheckpointError: naming file and tensor, if a value is not finite.
        """
        if self.is_readable() and not self._dense_checked:
            self.checkpoint().check_dense(dtype)
            self._dense_checked = True

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Note what fails inside: layers that are partly filled must never be served, nor filled further.

        Raises:
            CheckpointError: if an earlier load failed.
        """
        if self.failed is not None:
            raise CheckpointError(
                f"an earlier load left the layers of this engine partly filled; start another engine. It ended "
                f"with: {self.failed}"
            )
        try:
            yield
        except CheckpointError as error:
            self.failed = str(error)
            raise


def open_checkpoint(model: str, revision: str | None, downloads: str | None) -> Checkpoint:
    """Open a checkpoint by its directory or its name on a hub, from which it is downloaded.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
    """
    directory = Path(model)
    if not directory.is_dir():
        # What vLLM's loader downloads next, to where it looks for it.
        files = ["*.safetensors", "*.json"]
        directory = Path(
            snapshot_download(model, revision=revision, cache_dir=downloads, allow_patterns=files)
        )
    return Checkpoint.open(directory)
