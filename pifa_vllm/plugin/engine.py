"""What an engine of a PIFA checkpoint needs before its weights are loaded, in each of its processes."""

from __future__ import annotations

from importlib.util import find_spec

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from pifa_vllm.errors import UnsupportedModelError
from pifa_vllm.plugin.compiled import ensure_graphs_load
from pifa_vllm.plugin.reload import guard_reloads
from pifa_vllm.plugin.view import CheckpointView

# Loaders of vLLM that do not read a Hugging Face directory's safetensors.
_OTHER_FORMATS = {
    "dummy": "makes weights up, which pivot rows cannot be",
    "mistral": "reads consolidated*.safetensors",
    "npcache": "reads pickles",
    "pt": "reads pickles",
    "runai_streamer_sharded": "reads what one of vLLM's workers saved",
    "sharded_state": "reads what one of vLLM's workers saved",
    "tensorizer": "reads what one of vLLM's workers saved",
}
# Before 0.32 vLLM replaces Triton's kernels on CPUs by name, where its launchers do not look for them.
_KERNELS_FOR_CPUS = "vllm.triton_utils.dispatcher"


def prepare(view: CheckpointView, vllm_config: VllmConfig, *, drafts: bool) -> None:
    """Refuse what an engine of a PIFA checkpoint cannot do, guard its adapters and reloads, find its graphs again.

    Args:
        view: of the checkpoint.
        vllm_config: of the engine.
        drafts: whether the model drafts for another one, which is what the engine serves.

    Raises:
        UnsupportedModelError: saying which option to change.
    """
    if reads := _OTHER_FORMATS.get(vllm_config.load_config.load_format):
        raise UnsupportedModelError(
            f"--load-format {vllm_config.load_config.load_format}: expected a format that reads the "
            f"checkpoint's safetensors, found one that {reads}. Leave the option out."
        )
    if current_platform.is_cpu():
        if vllm_config.speculative_config is not None and find_spec(_KERNELS_FOR_CPUS) is None:
            raise UnsupportedModelError(
                f"--speculative-config: vLLM {vllm.__version__} cannot verify drafts on CPUs, whatever the model; "
                "vLLM 0.32 can. Leave the option out, or update vLLM."
            )
        ensure_graphs_load()
    if drafts:
        return
    guard_reloads(vllm_config)
    if vllm_config.lora_config is not None:
        # Without adapters, what it rebinds in vLLM need not be there.
        from pifa_vllm.plugin.lora import guard_adapters

        guard_adapters(vllm_config, view.checkpoint)
