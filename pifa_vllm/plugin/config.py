"""vLLM's view of a PIFA checkpoint: which of its layers are compressed, and to which ranks.

Every vLLM process imports this module, whatever model it serves. What only PIFA checkpoints need is therefore
imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.plugin.versions import check_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

    from pifa_vllm.checkpoint import Checkpoint, PIFAConfig
    from pifa_vllm.plugin.layout import Shard

# What the names of all layers begin with in a model that drafts for another one (speculative decoding).
_DRAFT_PREFIX = "draft_model."


class PIFAQuantizationConfig(QuantizationConfig):
    """The `quantization_config` of a PIFA checkpoint, matched against the layers that vLLM builds.

    Attributes:
        ranks: module name, as vLLM calls it, to rank.
        tensors: the names of all tensors in the checkpoint, as vLLM calls them; None where the model is not a
            local directory, and completeness is known only while loading.
        shapes: of the same, under the checkpoint's names.
        model: directory or name of the model.
        revision: of a name.
        failed: what ended a load midway, which leaves the layers in an undefined state.
    """

    def __init__(self, checkpoint: PIFAConfig) -> None:
        super().__init__()
        self.ranks = dict(checkpoint.ranks)
        self.tensors: set[str] | None = None
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.failed: str | None = None
        self.model = ""
        self.revision: str | None = None
        # vLLM's name of a module to the checkpoint's.
        self._names = {name: name for name in checkpoint.ranks}
        self._matched: set[str] = set()
        self._checkpoint: Checkpoint | None = None
        self._prepared = False
        self._dense_checked = False

    def __repr__(self) -> str:
        return f"PIFAQuantizationConfig({len(self.ranks)} compressed modules)"

    @classmethod
    def get_name(cls) -> str:
        """The `quant_method` of config.json."""
        return "pifa"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any dtype that vLLM computes in: PIFA's factors are ordinary matrices."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Volta, the oldest that vLLM itself runs on: nothing here needs more."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json, no further files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PIFAQuantizationConfig:
        """Parse the `quantization_config` of config.json.

        Raises:
            PifaError: if this vLLM is too old.
            CheckpointError: naming the offending field.
        """
        from pifa_vllm.checkpoint import PIFAConfig

        # The first that vLLM calls for a PIFA checkpoint, and it never does for another model.
        check_vllm(vllm.__version__)
        return cls(PIFAConfig.parse(config, "config.json"))

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Check a local checkpoint's headers and pivot rows before any process or memory is spent on it.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
            UnsupportedModelError: if the layers are to be quantized while they are loaded.
        """
        from pifa_vllm.checkpoint import Checkpoint

        if self.online_quantization_config is not None:
            raise UnsupportedModelError(
                f"{model_name}: vLLM's quantization_config asks for layers to be quantized while they are loaded, "
                "which is for dense weights; the layers of a PIFA checkpoint are not. Leave the option out."
            )
        self.model, self.revision = model_name, revision
        directory = Path(model_name)
        if directory.is_dir():
            checkpoint = Checkpoint.open(directory)
            checkpoint.check_pivot_rows()
            self.tensors = set(checkpoint.shards.entries)
            self.shapes = {name: entry.shape for name, entry in checkpoint.shards.entries.items()}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename modules and tensors as the model does that vLLM is about to build."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self._names = hf_to_vllm_mapper.apply_dict(self._names)
        if self.tensors is not None:
            self.tensors = set(hf_to_vllm_mapper.apply_list(list(self.tensors)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose PIFA for a linear layer with a compressed shard, and the dense method for the others.

        Raises:
            CheckpointError: if a local checkpoint lacks one of the layer's tensors.
            UnsupportedModelError: if an option of the engine does not go with PIFA.
        """
        from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        from pifa_vllm.plugin.dense import StreamedEmbeddingMethod, StreamedLinearMethod
        from pifa_vllm.plugin.layout import Shard
        from pifa_vllm.plugin.linear import PIFALinearMethod

        if not self._prepared and (vllm_config := get_current_vllm_config_or_none()):
            from pifa_vllm.plugin.engine import prepare

            self._prepared = True
            prepare(self, vllm_config)
            if self._is_readable():
                # Of a name on a hub, too, before any layer is allocated by what its config.json says.
                self.checkpoint()
        if isinstance(layer, ParallelLMHead) and current_platform.is_cpu():
            if get_current_vllm_config().speculative_config is not None:
                from pifa_vllm.plugin.verification import ensure_verification

                # Here, because the rank that samples is the one with an lm_head.
                ensure_verification()
            return StreamedEmbeddingMethod()
        if not isinstance(layer, LinearBase):
            # None gives embeddings and attention the method that they have in a dense model.
            return None
        shards = [Shard(name, self.ranks.get(name)) for name in self._shard_names(prefix)]
        self._matched.update(shard.name for shard in shards)
        self._check_tensors(shards, layer.has_bias)
        if all(shard.rank is None for shard in shards):
            return StreamedLinearMethod() if current_platform.is_cpu() else UnquantizedLinearMethod()
        return PIFALinearMethod(self, shards)

    def check_all_matched(self) -> None:
        """Check, once the model is built, that every compressed module became a layer of it.

        Raises:
            CheckpointError: naming a module that did not.
        """
        from vllm.distributed import get_pp_group

        if get_pp_group().world_size > 1:
            # Each pipeline rank builds its own layers only, and skips the tensors of the others.
            return
        unknown = sorted(self.ranks.keys() - self._matched)
        if unknown:
            raise CheckpointError(
                f"config.json: quantization_config.ranks names {len(unknown)} modules that are no linear "
                f"layers of the model as vLLM builds it, first {unknown[0]!r}; vLLM's are called like "
                f"{min(self._matched)!r}."
            )

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
        return checkpoint.pivot_rows(module)

    def checkpoint(self) -> Checkpoint:
        """Open the checkpoint, or its download, once.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        if self._checkpoint is None:
            self._checkpoint = open_checkpoint(self.model, self.revision)
        return self._checkpoint

    def check_dense(self, dtype: torch.dtype) -> None:
        """Check, once the first load has read them, the tensors that are none of the PIFA layers'.

        vLLM gives them to layers that check nothing, so they are read again, from the disk's cache. Reloads are
        read through before.

        Args:
            dtype: that the model is served in.

        Raises:
            CheckpointError: naming file and tensor, if a value is not finite.
        """
        if self._is_readable() and not self._dense_checked:
            self.checkpoint().check_dense(dtype)
            self._dense_checked = True

    def _is_readable(self) -> bool:
        """Tell whether the checkpoint can be opened here: what is in a bucket, only vLLM's loader reads."""
        from_hub = "://" not in self.model and not vllm.envs.VLLM_USE_MODELSCOPE
        return bool(self.model) and (from_hub or Path(self.model).is_dir())

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a compressed module that vLLM calls `name`."""
        return self._names[name]

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

    def _shard_names(self, prefix: str) -> list[str]:
        """The checkpoint's names of a layer, several if vLLM fuses them (qkv_proj, gate_up_proj)."""
        parent, dot, last = prefix.removeprefix(_DRAFT_PREFIX).rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def _check_tensors(self, shards: list[Shard], has_bias: bool) -> None:
        """Check what vLLM's loader does not for quantized models: that nothing stays uninitialised."""
        if self.tensors is None:
            return
        for shard in shards:
            for suffix in (*shard.suffixes, *(["bias"] if has_bias else [])):
                if f"{shard.name}.{suffix}" not in self.tensors:
                    raise CheckpointError(
                        f"layer {shard.name}: tensor {shard.name}.{suffix} is missing from the checkpoint."
                    )


def open_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Open a checkpoint by its directory or its name on a hub, from which it is downloaded.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
    """
    from huggingface_hub import snapshot_download
    from vllm.config import get_current_vllm_config

    from pifa_vllm.checkpoint import Checkpoint

    directory = Path(model)
    if not directory.is_dir():
        # What vLLM's loader downloads next, to where it looks for it.
        cache = get_current_vllm_config().load_config.download_dir
        files = ["*.safetensors", "*.json"]
        directory = Path(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=files))
    return Checkpoint.open(directory)
