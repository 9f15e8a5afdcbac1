"""What vLLM asks about a PIFA checkpoint: whether it can be served, and by which method each layer of the model.

Every vLLM process imports this module, whatever model it serves. What only PIFA checkpoints need is therefore
imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from pifa_vllm.errors import UnsupportedModelError
from pifa_vllm.plugin.versions import check_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

    from pifa_vllm.checkpoint import PIFAConfig


class PIFAQuantizationConfig(QuantizationConfig):
    """The `quantization_config` of a PIFA checkpoint, matched against the layers that vLLM builds.

    Attributes:
        view: of the checkpoint; what layers need of it, they ask this.
    """

    def __init__(self, checkpoint: PIFAConfig) -> None:
        from pifa_vllm.plugin.view import CheckpointView

        super().__init__()
        self.view = CheckpointView(checkpoint)
        self._prepared = False

    def __repr__(self) -> str:
        return f"PIFAQuantizationConfig({len(self.view.ranks)} compressed modules)"

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
        if self.online_quantization_config is not None:
            raise UnsupportedModelError(
                f"{model_name}: vLLM's quantization_config asks for layers to be quantized while they are loaded, "
                "which is for dense weights; the layers of a PIFA checkpoint are not. Leave the option out."
            )
        self.view.find(model_name, revision, on_hub=not vllm.envs.VLLM_USE_MODELSCOPE)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename modules and tensors as the model does that vLLM is about to build."""
        self.view.rename(hf_to_vllm_mapper.apply_dict)

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
        from pifa_vllm.plugin.linear import PIFALinearMethod

        if not self._prepared and (vllm_config := get_current_vllm_config_or_none()):
            from pifa_vllm.plugin.engine import prepare

            self._prepared = True
            self.view.downloads = vllm_config.load_config.download_dir
            prepare(self.view, vllm_config, drafts=vllm_config.quant_config is not self)
            if self.view.is_readable():
                # Of a name on a hub, too, before any layer is allocated by what its config.json says.
                self.view.checkpoint()
        if isinstance(layer, ParallelLMHead) and current_platform.is_cpu():
            if get_current_vllm_config().speculative_config is not None:
                from pifa_vllm.plugin.verification import ensure_verification

                # Here, because the rank that samples is the one with an lm_head.
                ensure_verification()
            return StreamedEmbeddingMethod()
        if not isinstance(layer, LinearBase):
            # None gives embeddings and attention the method that they have in a dense model.
            return None
        shards = self.view.shards(prefix, self.packed_modules_mapping, has_bias=layer.has_bias)
        if self.view.kind is None and all(shard.rank is None for shard in shards):
            return StreamedLinearMethod() if current_platform.is_cpu() else UnquantizedLinearMethod()
        return PIFALinearMethod(self.view, shards)
