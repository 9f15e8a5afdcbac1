"""The PIFA linear layer: one op, `pifa::linear`, with kernels for CPUs and GPUs."""

from pifa_vllm.ops.linear import pifa_linear, stacked_rows

__all__ = ["pifa_linear", "stacked_rows"]
