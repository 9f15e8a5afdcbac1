"""Registers `pifa_vllm.hf` with transformers when transformers loads its quantizers, and not before.

transformers has no entry points for quantizers, and importing them takes seconds, most of them for torch.
Paying that in `import pifa_vllm` would slow down every `pifa-vllm --help` and every process that looks for
vLLM plugins. So either the quantizers are there already and ours joins them at once, or it waits for them.
"""

from __future__ import annotations

import importlib
import warnings

from pifa_vllm.imports import when_imported

# The module with the table of quantizers; whatever loads a model with weights imports it.
_QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Make transformers know the `pifa` quantizer, now or as soon as it loads its own. Idempotent."""
    when_imported(_QUANTIZERS, _import_hf)


def _import_hf() -> None:
    try:
        importlib.import_module("pifa_vllm.hf")
    except Exception as error:
        # Whatever is wrong with ours, other models must go on loading.
        warnings.warn(f"transformers will not load PIFA checkpoints: {error!r}", stacklevel=2)
