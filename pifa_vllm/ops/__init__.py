"""The PIFA linear layer: `pifa_linear`, the order of its outputs, and its last step by itself."""

from pifa_vllm.ops.assemble import assemble
from pifa_vllm.ops.linear import pifa_linear, stacked_order

__all__ = ["assemble", "pifa_linear", "stacked_order"]
