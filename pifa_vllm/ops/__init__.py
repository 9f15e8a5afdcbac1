"""The PIFA linear layer: one op, `pifa::linear`, with kernels for CPUs and GPUs."""

from pifa_vllm.ops.columns import Matrix, column_order, dense, pivot_columns_linear
from pifa_vllm.ops.linear import pifa_linear, stacked_rows

__all__ = ["Matrix", "column_order", "dense", "pifa_linear", "pivot_columns_linear", "stacked_rows"]
