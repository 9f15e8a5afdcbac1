"""Where a tile of remaining rows lies, when the shards' rows are cut into tiles one shard after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

# What is prepared for a layer and a plan, and launches its kernels.
Launch = Callable[..., Tensor]


def cdiv(size: int, block: int) -> int:
    """Count the blocks that a size takes; triton.cdiv takes microseconds."""
    return -(-size // block)


def count_tiles(ranks: Sequence[int], out_features: Sequence[int], block: int) -> int:
    """Count the tiles of `block` remaining rows of all shards; no tile spans two shards."""
    return sum(cdiv(m - r, block) for r, m in zip(ranks, out_features, strict=True))


@triton.jit
def locate(
    tile: tl.tensor, ranks: tl.tuple, out_features: tl.tuple, widths: tl.tuple, BLOCK: tl.constexpr
) -> tl.tensor:
    """Find the shard that a tile of BLOCK remaining rows belongs to.

    Args:
        tile: index among the tiles of all shards, in [0, `count_tiles`).
        ranks: r_i per shard.
        out_features: m_i per shard.
        widths: elements that a row of the shard's matrix takes: r_i, unless numbers are packed.
        BLOCK: rows per tile.

    Returns:
        (first, rows, rank, pivot, stacked, width, offset): the tile's first row within its shard; the shard's
        remaining rows and its rank; the index of its first pivot row among all pivot rows, and of its first
        remaining row in the stacked order; its width, and the index of its first element in the flat matrices
        (int64).
    """
    pivots = tl.full((), 0, tl.int32)
    for i in tl.static_range(len(ranks)):
        pivots += ranks[i]
    # `full` makes a value of the ranks that Triton turned into constants, which it does with every 1.
    rank = tl.full((), ranks[0], tl.int32)
    rows = tl.full((), out_features[0], tl.int32) - rank
    first = tile * BLOCK
    pivot = tl.full((), 0, tl.int32)
    stacked = pivots
    width = tl.full((), widths[0], tl.int32)
    offset = tl.full((), 0, tl.int64)
    for i in tl.static_range(1, len(ranks)):
        padded = tl.cdiv(rows, BLOCK) * BLOCK
        behind = first >= padded  # then all of it moves on by one shard
        first = tl.where(behind, first - padded, first)
        pivot = tl.where(behind, pivot + rank, pivot)
        stacked = tl.where(behind, stacked + rows, stacked)
        offset = tl.where(behind, offset + rows.to(tl.int64) * width, offset)
        width = tl.where(behind, widths[i], width)
        rank = tl.where(behind, ranks[i], rank)
        rows = tl.where(behind, out_features[i] - ranks[i], rows)
    return first, rows, rank, pivot, stacked, width, offset
