"""Which tiles a launch uses: tables, and the rule that picks from them by the shapes alone.

Nothing is tuned while serving. The tables hold few tiles, so that a model needs few compiled kernels, and no choice
but the bucket of the token count depends on the tokens of a decode launch. The figures come from the memory and
occupancy that the compiled kernels need (`pifa-vllm bench cubins`) and from the cost model, not yet from
measurements on GPUs (`make gpu-check`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from pifa_vllm.ops.triton.shards import cdiv, count_tiles

# The last token count that the decode kernels take.
DECODE_TOKENS = 64
_BUCKETS = (1, 16, 32, DECODE_TOKENS)
# Splits of n in the first launch.
SPLITS = (1, 2, 4, 8)
# What splitting costs, in multiplications of one of an H100's multiprocessors: the launch that sums (1.5 µs), and
# each number of each part, which is written to L2 and read again.
_SUM_COST = 5_600_000
_PART_COST = 5


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
    """The launches of `decode`.

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
    def sums_while_loading(self) -> bool:
        """Whether the second launch sums the partials; for several tokens it would read them too often."""
        return self.block_tokens == 1

    @property
    def copied(self) -> int:
        """Pivot rows that one program of the second launch copies."""
        return min(256, 4096 // self.block_tokens)


@dataclass(frozen=True)
class QuantizedPlan:
    """The launches of `quantized`: tokens of a tile, the tiles of the two, the splits of n in the first."""

    block_tokens: int
    pivots: Tile
    outputs: Tile
    splits: int = 1
    precision: str = "tf32x3"


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
    """The launches of `prefill`: their tiles, the splits of n in the first, the precision of float32 products."""

    pivots: PrefillTile
    outputs: PrefillTile
    splits: int = 1
    precision: str = "tf32x3"


# Bits per number, then tokens: the larger tile where it fills the device, else the smaller. More rows read x and
# y_p less often from L2, fewer give more programs. All fit into the smallest shared memory, that of sm_89.
DECODE: dict[int, dict[int, tuple[Tile, Tile]]] = {
    16: {
        1: (Tile(16, 512, 4, 3), Tile(8, 256, 4, 6)),
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

# Of quantized factors: bits of the activations, then tokens of a tile.
QUANTIZED: dict[int, dict[int, Tile]] = {
    16: {1: Tile(16, 256, 4, 3), 16: Tile(32, 128, 4, 4), 64: Tile(64, 128, 8, 3), 128: Tile(128, 64, 8, 3)},
    32: {1: Tile(16, 256, 4, 3), 16: Tile(32, 128, 4, 3), 64: Tile(64, 32, 8, 3), 128: Tile(64, 32, 8, 2)},
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


def bucket(tokens: int) -> int:
    """Round a token count up to one that plans are made for: of prefills, eight to each power of two."""
    for size in _BUCKETS:
        if tokens <= size:
            return size
    step = max(DECODE_TOKENS, 1 << (tokens - 1).bit_length() - 4)
    return cdiv(tokens, step) * step


def buckets(tokens: int) -> Iterator[int]:
    """List the buckets of all token counts up to this one, in ascending order."""
    size = 0
    while size < tokens:
        size = bucket(size + 1)
        yield size


@cache
def describe(index: int) -> Device:
    """Describe the GPU of this index."""
    properties = torch.cuda.get_device_properties(index)
    return Device(_family(properties.major, properties.minor), properties.multi_processor_count)


def plan_plain(
    device: Device, bits: int, tokens: int, n: int, ranks: Sequence[int], out_features: Sequence[int]
) -> DecodePlan | PrefillPlan:
    """Choose the kernels for plain factors, and how they are launched."""
    plan = plan_decode if tokens <= DECODE_TOKENS else plan_prefill
    return plan(device, bits, tokens, n, ranks, out_features)


def plan_decode(
    device: Device, bits: int, tokens: int, n: int, ranks: Sequence[int], out_features: Sequence[int]
) -> DecodePlan:
    """Choose the tiles and the split of n for at most `DECODE_TOKENS` tokens.

    Of the token count only its bucket matters.
    """
    block_tokens = bucket(tokens)
    large, small = DECODE[bits][block_tokens]
    pivots, wanted = sum(ranks), device.multiprocessors
    second = large if count_tiles(ranks, out_features, large.rows) >= wanted else small
    if cdiv(pivots, large.rows) >= wanted:
        first, splits = large, 1
    elif block_tokens == 16 and 2 * cdiv(pivots, small.rows) >= wanted:
        # A third launch costs more than the idle multiprocessors; with more tokens, reading x for small tiles does.
        first, splits = small, 1
    else:
        first = small if block_tokens == 1 else large
        enough = (s for s in SPLITS if s * cdiv(pivots, first.rows) >= wanted or 4 * s > cdiv(n, first.k))
        splits = next(enough, SPLITS[-1])
    return DecodePlan(block_tokens, splits, first, second, device.precision, device.overlap)


def plan_prefill(
    device: Device, bits: int, tokens: int, n: int, ranks: Sequence[int], out_features: Sequence[int]
) -> PrefillPlan:
    """Choose for each launch the tile, and for the first the splits, with the least estimated time.

    That is waves · multiplications of a tile / speed; shards that are shallower than the deepest count as deep.
    """

    def time(tile: PrefillTile, row_tiles: int, depth: int, splits: int = 1) -> float:
        programs = cdiv(tokens, tile.tokens) * row_tiles * splits
        waves = cdiv(programs, device.multiprocessors)
        steps = cdiv(cdiv(depth, tile.k), splits)
        work = waves * tile.tokens * tile.rows * steps * tile.k / tile.speed
        return work if splits == 1 else work + _SUM_COST + _PART_COST * splits * tokens * sum(ranks)

    tiles = PREFILL[device.family][bits]
    first, splits = min(
        itertools.product(tiles, SPLITS),
        key=lambda choice: time(choice[0], cdiv(sum(ranks), choice[0].rows), n, choice[1]),
    )
    second = min(tiles, key=lambda tile: time(tile, count_tiles(ranks, out_features, tile.rows), max(ranks)))
    return PrefillPlan(first, second, splits, device.precision)


def plan_quantized(device: Device, bits: int, tokens: int, n: int, ranks: Sequence[int]) -> QuantizedPlan:
    """Choose the tiles by the token count, and for few tokens split n until the pivot rows fill the device."""
    table = QUANTIZED[bits]
    block_tokens = next((size for size in table if tokens <= size), max(table))
    tile = table[block_tokens]
    programs = cdiv(sum(ranks), tile.rows) * cdiv(tokens, block_tokens)
    enough = (s for s in SPLITS if s * programs >= device.multiprocessors or 4 * s > cdiv(n, tile.k))
    return QuantizedPlan(block_tokens, tile, tile, next(enough, SPLITS[-1]), device.precision)


def _family(major: int, minor: int) -> str:
    if torch.version.hip is not None:
        return "hip"
    if (major, minor) == (8, 0):
        return "sm_80"
    # 8.6, 8.9 and 12.x have the small shared memory; what is unknown is taken for one of them.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_89")
