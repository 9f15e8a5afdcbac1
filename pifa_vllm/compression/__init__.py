"""MPIFA compression of a dense model, offline (arXiv 2501.19090)."""
