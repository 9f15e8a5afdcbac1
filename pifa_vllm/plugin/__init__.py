"""The vLLM plugin: stock vLLM serves PIFA checkpoints once this package is installed.

vLLM calls `register` through the entry point group `vllm.general_plugins` in each of its processes, whatever
model they serve. For every model that means: one more quantization method in vLLM's table, and one method of vLLM's
executor of several processes that looks at the model's quantization first (`replies.py`). What else is mended or
wrapped in vLLM is so from the time that a PIFA model's configuration is read, in the process that reads it.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType

from wrapt import register_post_import_hook

from pifa_vllm.plugin.versions import supported


def register() -> None:
    """Make vLLM know `quant_method: "pifa"`.

    Calling it again changes nothing, and models with another quantization, or none, never reach our code. It
    does not raise: vLLM runs it for every model, and a vLLM that it does not fit must still serve the others.
    """
    try:
        # vLLM is imported here, not at the top, so that importing this module costs nothing.
        from vllm.model_executor.layers.quantization import (
            QUANTIZATION_METHODS,
            register_quantization_config,
        )

        # Only engines of several ranks have it.
        register_post_import_hook(_mend_executor, "vllm.v1.executor.multiproc_executor")
        if "pifa" not in QUANTIZATION_METHODS:
            from pifa_vllm.plugin.config import PIFAQuantizationConfig

            register_quantization_config("pifa")(PIFAQuantizationConfig)
    except Exception:
        found = getattr(sys.modules.get("vllm"), "__version__", "one of unknown version")
        logging.getLogger("vllm.pifa_vllm").exception(
            "pifa-vllm, which is made for vLLM %s, could not register with this one (%s), so PIFA checkpoints will "
            "be refused as an unknown quantization method; other models are not affected. To serve PIFA "
            "checkpoints, install a vLLM of that range.",
            supported(),
            found,
        )


def _mend_executor(_executor: ModuleType) -> None:
    try:
        from pifa_vllm.plugin.replies import take_all_replies

        take_all_replies()
    except Exception as error:
        # It runs while vLLM imports its executor, which must succeed for every model.
        logging.getLogger("vllm.pifa_vllm").warning("vLLM's executor is not as expected: %r", error)
