"""Fail unless the vLLM of this environment knows PIFA checkpoints; run while an image is built.

Without the plugin, vLLM serves every other model as usual, so an image could lack it for long without a word.
"""

from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

load_general_plugins()
# vLLM only logs what a plugin fails with. This raises if `pifa` is not among its methods.
method = get_quantization_config("pifa")
print(f"vLLM serves quant_method pifa by {method.__module__}.{method.__qualname__}")
