"""Registers `pifa_vllm.hf` with transformers when transformers loads its quantizers, and not before.

Likewise `pifa_vllm.guard`, which looks at a checkpoint as soon as transformers has read its config.json.

transformers has no entry points for quantizers, and importing them takes seconds, most of them for torch.
Paying that in `import pifa_vllm` would slow down every `pifa-vllm --help` and every process that looks for
vLLM plugins. So either the quantizers are there already and ours joins them at once, or it waits for them.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from wrapt import register_post_import_hook

# The module with the table of quantizers; whatever loads a model with weights imports it.
_QUANTIZERS = "transformers.quantizers.auto"
# Whatever loads a config, a model's or a tokenizer's, imports this.
_CONFIGS = "transformers.configuration_utils"


def register() -> None:
    """Make transformers know the `pifa` quantizer, now or as soon as it loads its own. Idempotent."""
    register_post_import_hook(_guard_configs, _CONFIGS)
    register_post_import_hook(_import_hf, _QUANTIZERS)


def _import_hf(_quantizers: ModuleType) -> None:
    try:
        importlib.import_module("pifa_vllm.hf")
    except Exception as error:
        # Whatever is wrong with ours, other models must go on loading.
        warnings.warn(f"transformers will not load PIFA checkpoints: {error!r}", stacklevel=2)


def _guard_configs(_configs: ModuleType) -> None:
    try:
        importlib.import_module("pifa_vllm.guard").guard_configs()
    except Exception as error:
        warnings.warn(
            f"sizes in the config.json of PIFA checkpoints will not be checked before transformers uses them: "
            f"{error!r}",
            stacklevel=2,
        )
