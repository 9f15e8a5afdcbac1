"""The last step of the PIFA linear layer: bring pivot and remaining outputs into the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# On the CPU index_select is the fastest below this many tokens, gather from there on, by up to two times, and
# for 16-bit dtypes always (an AMD EPYC, 2 threads, 576 to 2048 rows). index_copy_ into a fresh output, advanced
# indexing and Inductor's fused loop are slower than the better of the two nearly everywhere.
_GATHER_FROM_TOKENS = 32


def assemble(y_p: Tensor, y_np: Sequence[Tensor], out_order: Tensor, bias: Tensor | None = None) -> Tensor:
    """Put the outputs of the pivot rows and of the remaining rows in their places.

    Args:
        y_p: [..., Σr], the outputs of the pivot rows of all matrices.
        y_np: [..., m_i - r_i] per matrix, the outputs of its remaining rows.
        out_order: int64 [Σm], see `stacked_order`.
        bias: [Σm] in output order, or None.

    Returns:
        [..., Σm], contiguous.
    """
    # Inductor must not fuse this step. Where an in-place op, such as vLLM's rotary embedding, follows on a slice
    # of the output, Inductor (as vLLM sets it) would read the fused slice by the strides of the whole, out of
    # bounds; the output of an op is a buffer to it. The op has no gradient: training takes the torch ops.
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        y: Tensor = torch.ops.pifa.assemble(y_p, list(y_np), out_order, bias)
        return y
    return _assemble(y_p, y_np, out_order, bias)


def _assemble(y_p: Tensor, y_np: Sequence[Tensor], out_order: Tensor, bias: Tensor | None) -> Tensor:
    stacked = torch.cat([y_p, *y_np], dim=-1)  # [..., Σm]
    tokens = stacked.numel() // out_order.numel()
    if stacked.device.type == "cpu" and (tokens >= _GATHER_FROM_TOKENS or stacked.dtype != torch.float32):
        y = stacked.gather(-1, out_order.expand_as(stacked))
    else:
        y = stacked.index_select(-1, out_order)
    return y if bias is None else y + bias


def _assemble_fake(y_p: Tensor, y_np: Sequence[Tensor], out_order: Tensor, bias: Tensor | None) -> Tensor:
    return y_p.new_empty((*y_p.shape[:-1], out_order.shape[0]))


_library = torch.library.Library("pifa", "DEF")  # type: ignore[no-untyped-call]  # torch has no annotations here
_library.define(  # type: ignore[no-untyped-call]
    "assemble(Tensor y_p, Tensor[] y_np, Tensor out_order, Tensor? bias) -> Tensor"
)
_library.impl("assemble", _assemble, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("pifa::assemble", _assemble_fake, lib=_library)
