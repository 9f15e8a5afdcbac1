"""Which tiles a launch uses: tables, and the rule that picks from them by the shapes alone.

Nothing is tuned while serving. The tables hold few tiles, so that a model needs few compiled kernels, and no choice
but the bucket of the token count depends on the tokens of a decode launch. The figures come from the memory and
occupancy that the compiled kernels need (`pifa-vllm bench cubins`) and from the cost model, not yet from
measurements on GPUs (`make gpu-check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from pifa_vllm.ops.triton.shards import count_tiles

# The last token count that the decode kernels take.
DECODE_TOKENS = 64
_BUCKETS = (1, 16, 32, 64)
# Splits of n. The partial sums of several tokens soon outweigh the weights, as every program of the second launch
# reads those of its shard; for one token they are little.
MAX_SPLITS = {1: 8, 16: 2, 32: 1, 64: 1}


@dataclass(frozen=True)
class Device:
    """What the choice depends on: the row of `PREFILL` and the number of multiprocessors."""

    family: str
    multiprocessors: int

    @property
    def overlap(self) -> bool:
        """Whether it has programmatic dependent launch."""
        return self.family in ("sm_90", "sm_100")

    @property
    def precision(self) -> str:
        """Of float32 products: three TF32 products keep float32's accuracy on tensor cores; AMD has none."""
        return "ieee" if self.family == "hip" else "tf32x3"


@dataclass(frozen=True)
class Tile:
    """A decode program's tile: `rows` weight rows by `k` inputs, with all tokens of the launch."""

    rows: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecodePlan:
    """The two launches of `decode`.

    Attributes:
        block_tokens: the bucket that the tokens were rounded up to.
        splits: of n, in the first launch.
        pivots: tile of the first launch.
        outputs: tile of the second launch.
        precision: of float32 products.
        overlap: launch the second kernel while the first runs.
    """

    block_tokens: int
    splits: int
    pivots: Tile
    outputs: Tile
    precision: str = "tf32x3"
    overlap: bool = False

    @property
    def copied(self) -> int:
        """Pivot rows that one program of the second launch copies."""
        return min(256, 4096 // self.block_tokens)


@dataclass(frozen=True)
class PrefillTile:
    """A prefill program's tile: `tokens` by `rows` outputs, `k` inputs at a time.

    `speed` is the share of a multiprocessor's peak that the tile is expected to reach.
    """

    tokens: int
    rows: int
    k: int
    warps: int
    stages: int
    speed: float


@dataclass(frozen=True)
class PrefillPlan:
    """The two launches of `prefill`: their tiles, and the precision of float32 products."""

    pivots: PrefillTile
    outputs: PrefillTile
    precision: str = "tf32x3"


# Bits per number, then tokens: the larger tile where it fills the device, else the smaller. More rows read x and
# y_p less often from L2, fewer give more programs. All fit into the smallest shared memory, that of sm_89.
DECODE: dict[int, dict[int, tuple[Tile, Tile]]] = {
    16: {
        1: (Tile(16, 512, 4, 3), Tile(8, 512, 4, 4)),
        16: (Tile(32, 128, 4, 5), Tile(16, 128, 4, 6)),
        32: (Tile(32, 128, 4, 4), Tile(16, 128, 4, 5)),
        64: (Tile(64, 64, 8, 4), Tile(32, 64, 4, 5)),
    },
    32: {
        1: (Tile(16, 128, 4, 5), Tile(8, 256, 4, 4)),
        16: (Tile(32, 64, 4, 4), Tile(16, 64, 4, 5)),
        32: (Tile(32, 32, 4, 5), Tile(16, 64, 4, 5)),
        64: (Tile(64, 32, 4, 4), Tile(32, 32, 4, 4)),
    },
}

_WIDE = PrefillTile(128, 256, 64, 8, 3, 0.75)
_SQUARE = PrefillTile(128, 128, 64, 4, 3, 0.65)
_SMALL = PrefillTile(64, 64, 64, 4, 4, 0.4)
_FLOAT32 = (PrefillTile(64, 128, 32, 8, 3, 0.6), PrefillTile(64, 64, 32, 4, 3, 0.4))

# Family, then bits per number.
PREFILL: dict[str, dict[int, tuple[PrefillTile, ...]]] = {
    "sm_80": {16: (_WIDE, PrefillTile(128, 128, 32, 4, 4, 0.65), _SMALL), 32: _FLOAT32},
    "sm_89": {16: (PrefillTile(128, 128, 32, 4, 4, 0.65), _SMALL), 32: _FLOAT32},
    "sm_90": {16: (_WIDE, _SQUARE, _SMALL), 32: _FLOAT32},
    "sm_100": {16: (_WIDE, _SQUARE, PrefillTile(128, 64, 64, 4, 4, 0.4)), 32: _FLOAT32},
    "hip": {
        16: (PrefillTile(128, 128, 64, 8, 2, 0.65), PrefillTile(64, 64, 64, 4, 2, 0.4)),
        32: (PrefillTile(64, 64, 32, 4, 2, 0.4),),
    },
}


@cache
def describe(index: int) -> Device:
    """Describe the GPU of this index."""
    properties = torch.cuda.get_device_properties(index)
    return Device(_family(properties.major, properties.minor), properties.multi_processor_count)


def plan_decode(
    device: Device, bits: int, tokens: int, n: int, ranks: Sequence[int], out_features: Sequence[int]
) -> DecodePlan:
    """Choose the tiles and the split of n for at most `DECODE_TOKENS` tokens.

    Of the token count only its bucket matters.
    """
    block_tokens = next(bucket for bucket in _BUCKETS if tokens <= bucket)
    large, small = DECODE[bits][block_tokens]
    pivots = sum(ranks)
    first = large if triton.cdiv(pivots, large.rows) >= device.multiprocessors else small
    second = large if count_tiles(ranks, out_features, large.rows) >= device.multiprocessors else small
    # For the same reason half of the multiprocessors are enough for several tokens.
    wanted = device.multiprocessors if block_tokens == 1 else device.multiprocessors // 2
    splits = 1
    while (
        splits < MAX_SPLITS[block_tokens]
        and triton.cdiv(pivots, first.rows) * splits < wanted
        and triton.cdiv(n, first.k) > 2 * splits
    ):
        splits *= 2
    return DecodePlan(block_tokens, splits, first, second, device.precision, device.overlap)


def plan_prefill(
    device: Device, bits: int, tokens: int, ranks: Sequence[int], out_features: Sequence[int]
) -> PrefillPlan:
    """Choose for each launch the tile with the least estimated time, waves · tile area / speed."""

    def time(tile: PrefillTile, row_tiles: int) -> float:
        waves: int = triton.cdiv(triton.cdiv(tokens, tile.tokens) * row_tiles, device.multiprocessors)
        return waves * tile.tokens * tile.rows / tile.speed

    tiles = PREFILL[device.family][bits]
    return PrefillPlan(
        min(tiles, key=lambda tile: time(tile, triton.cdiv(sum(ranks), tile.rows))),
        min(tiles, key=lambda tile: time(tile, count_tiles(ranks, out_features, tile.rows))),
        device.precision,
    )


def _family(major: int, minor: int) -> str:
    if torch.version.hip is not None:
        return "hip"
    if (major, minor) == (8, 0):
        return "sm_80"
    # 8.6, 8.9 and 12.x have the small shared memory; what is unknown is taken for one of them.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_89")
