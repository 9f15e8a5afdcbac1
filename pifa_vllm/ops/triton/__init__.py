"""The PIFA linear layer on GPUs, in Triton: two or three launches for all shards of a layer."""

from pifa_vllm.ops.triton.linear import linear_cuda

__all__ = ["linear_cuda"]
