"""--threads, which several commands have."""

from __future__ import annotations

from pifa_vllm.errors import PifaError


def use_threads(threads: int | None) -> None:
    """Compute with as many CPU threads; None leaves the choice to torch.

    Raises:
        PifaError: if there are none.
    """
    import torch

    if threads is None:
        return
    if threads < 1:
        raise PifaError(f"--threads: expected 1 or more, found {threads}.")
    torch.set_num_threads(threads)
