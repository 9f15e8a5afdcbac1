"""Large pages for weights.

A decoding step walks through all weights once. In pages of 4 KiB that is a page walk for every 4 KiB read, each
step of which is a walk of its own under a hypervisor; nor do the processor's prefetchers go on beyond a page. Linux
keeps its large pages (2 MiB on x86) for memory that asks for them, as it is set up on most machines
(`transparent_hugepage/enabled` is `madvise`), and torch asks only under THP_MEM_ALLOC_ENABLE=1.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
# Of madvise(2), since Linux 6.1; Python's mmap has no name for it.
_MADV_COLLAPSE = 25


def ask_for_large_pages(weight: Tensor) -> None:
    """Give a weight large pages, now and for what will be written into it; silently not, where there are none.

    Pages that hold values already are replaced from Linux 6.1 on. Before, the kernel replaces them by and by.

    Args:
        weight: in CPU memory that nothing maps from a file; values and address stay as they are. The pages at its
            ends may be shared with its neighbours in memory.
    """
    size = _page_size()
    if size is None or weight.nbytes < size:
        return
    begin = weight.data_ptr() // size * size
    end = -(-(weight.data_ptr() + weight.nbytes) // size) * size
    # Errors are that the kernel has no page to give, or that a neighbour's address is not mapped. Neither matters.
    for advice in (mmap.MADV_HUGEPAGE, _MADV_COLLAPSE):
        _madvise()(begin, end - begin, advice)


@functools.cache
def _page_size() -> int | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        return int(_SIZE.read_text(encoding="ascii"))
    except OSError:  # a kernel without them
        return None


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise  # type: ignore[no-any-return]  # ctypes makes functions from names
