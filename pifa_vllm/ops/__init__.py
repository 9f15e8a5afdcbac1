"""The PIFA linear layer: `pifa_linear`, and the order of its outputs."""

from pifa_vllm.ops.linear import pifa_linear, stacked_order

__all__ = ["pifa_linear", "stacked_order"]
