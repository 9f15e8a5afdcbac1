"""The Triton kernels: compiled and predicted without a GPU, checked and timed on one."""
