"""A model of the layers' cost on GPUs: a prediction from data sheets and assumptions, not a measurement.

It takes the launches that `pifa_vllm.ops.triton` would make, with their tiles, and charges each with the largest of
three times: its bytes at the memory's bandwidth, for few tokens what its programs read through L2 at the rate that
multiprocessors can read, and for many its waves of tiles at the tensor cores' peak. Dense layers are charged as if
a library never left a multiprocessor idle. `make gpu-check` measures instead.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_vllm.bench.shapes import SHAPES, LayerShape
from pifa_vllm.bench.table import markdown_table
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.factorization import lowrank_rank, pifa_rank
from pifa_vllm.ops.triton.configs import (
    DECODE_TOKENS,
    PREFILL,
    Device,
    PrefillTile,
    plan_decode,
    plan_prefill,
)
from pifa_vllm.ops.triton.shards import count_tiles

TOKENS = (1, 16, 64, 256, 1024, 4096)
DENSITIES = (0.5, 0.7)

# Assumed, on no data sheet.
BANDWIDTH_SHARE = 0.9  # of the memory's bandwidth that a streaming kernel reaches
BYTES_PER_CLOCK = 32  # that a multiprocessor reads through L2
LAUNCH = 1.5e-6  # seconds a launch in a CUDA graph takes to fill and drain the device
OVERLAPPED_LAUNCH = 0.5e-6  # the same of a launch that overlaps the one before it
# What Triton's tiles reach of the library's speed at many tokens: all, or less. Its tutorial's product had 0.70 to
# 0.99 of cuBLAS's rate on an A100 in squares of 2,048 to 2,944 (github.com/triton-lang/triton, issue 6523).
TRITON_SHARES = (1.0, 0.8)
NUMBER = 2  # bytes


@dataclass(frozen=True)
class GPU:
    """Figures from NVIDIA's data sheet or architecture paper named in `source`.

    Attributes:
        family: row of the kernels' table of tiles.
        flops: dense bfloat16 FLOP/s of the tensor cores.
        bandwidth: of the memory, bytes/s.
        multiprocessors: number of SMs.
        clock: boost clock, Hz.
        source: where the figures stand.
    """

    family: str
    flops: float
    bandwidth: float
    multiprocessors: int
    clock: float
    source: str

    @property
    def device(self) -> Device:
        """What the kernels' choice of tiles sees of it."""
        return Device(self.family, self.multiprocessors)


GPUS = {
    "A100": GPU("sm_80", 312e12, 2.039e12, 108, 1.41e9, "A100 80GB SXM data sheet; GA100 white paper"),
    "L40S": GPU("sm_89", 362.05e12, 0.864e12, 142, 2.52e9, "L40S data sheet; Ada white paper"),
    "H100": GPU("sm_90", 989.4e12, 3.35e12, 132, 1.83e9, "H100 SXM data sheet; GH100 white paper"),
    "H200": GPU("sm_90", 989.4e12, 4.8e12, 132, 1.83e9, "H200 SXM data sheet; GH100 white paper"),
    "B200": GPU("sm_100", 2250e12, 8.0e12, 148, 1.965e9, "HGX B200 data sheet; Blackwell tuning guide"),
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        bytes: read from and written to memory, everything once.
        reads: bytes that all programs together read through L2.
        flops: multiplications and additions.
        programs: that do the work.
        wave_flops: FLOPs of the tiles that the launch occupies tensor cores for, at the tiles' share of the peak:
            waves · multiprocessors · FLOPs of a tile / speed; 0 where bytes hide them.
        overlapped: it starts before the launch ahead of it ends.
    """

    bytes: int
    reads: int
    flops: int
    programs: int
    wave_flops: float = 0.0
    overlapped: bool = False

    def seconds(self, gpu: GPU) -> float:
        """Return the predicted time."""
        reading = min(self.programs, gpu.multiprocessors) * BYTES_PER_CLOCK * gpu.clock
        work = max(
            self.bytes / (BANDWIDTH_SHARE * gpu.bandwidth),
            self.reads / reading,
            max(self.wave_flops, self.flops) / gpu.flops,
        )
        return work + (OVERLAPPED_LAUNCH if self.overlapped else LAUNCH)


def dense_launch(gpu: GPU, tokens: int, layer: LayerShape, share: float = 1.0) -> Launch:
    """Predict y = x Wᵀ by a library that fills the device at every size; our best tile has a share of its speed."""
    m, n = layer.m, layer.n
    moved, flops = NUMBER * (m * n + tokens * (n + m)), 2 * tokens * m * n
    speed = max(tile.speed for tile in PREFILL[gpu.family][16]) / share
    return Launch(moved, moved, flops, gpu.multiprocessors, flops / speed)


def factored_launches(
    gpu: GPU, tokens: int, layer: LayerShape, ranks: Sequence[int], *, pivoting: bool = True
) -> tuple[Launch, ...]:
    """Predict the launches of PIFA or, if not `pivoting`, of plain low rank, both in our kernels."""
    pivots, n = sum(ranks), layer.n
    # To the last launch plain low rank is a matrix with r more rows, none of whose m is a pivot.
    sizes = [m if pivoting else m + r for r, m in zip(ranks, layer.out_features, strict=True)]
    coefficients = sum(r * (m - r) for r, m in zip(ranks, sizes, strict=True))
    moved = NUMBER * (pivots * n + tokens * n), NUMBER * (coefficients + tokens * (pivots + layer.m))
    flops = 2 * tokens * pivots * n, 2 * tokens * coefficients
    if tokens <= DECODE_TOKENS:
        plan = plan_decode(gpu.device, 16, tokens, n, ranks, sizes)
        programs = _tiles(pivots, plan.pivots.rows)
        parts = _partial_bytes(tokens, pivots, plan.splits)
        first = Launch(
            moved[0] + parts,
            moved[0] + NUMBER * tokens * n * programs,
            flops[0],
            programs * plan.splits,
        )
        # Every tile of rows reads its shard's y_p, or its parts.
        number = parts // (tokens * pivots) if plan.sums_while_loading else NUMBER
        tiles = [_tiles(m - r, plan.outputs.rows) for r, m in zip(ranks, sizes, strict=True)]
        reads = moved[1] + sum(number * tokens * r * t for r, t in zip(ranks, tiles, strict=True))
        last = Launch(moved[1], reads, flops[1], sum(tiles), overlapped=plan.overlap)
        summed = plan.splits > 1 and not plan.sums_while_loading
    else:
        plans = plan_prefill(gpu.device, 16, tokens, n, ranks, sizes)
        splits, summed = plans.splits, plans.splits > 1
        parts = _partial_bytes(tokens, pivots, splits)
        rows = _tiles(pivots, plans.pivots.rows)
        first = _prefill_launch(gpu, tokens, n, plans.pivots, rows, splits, moved[0] + parts, flops[0])
        # Shards differ in depth; charge the deepest.
        rows = count_tiles(ranks, sizes, plans.outputs.rows)
        last = _prefill_launch(gpu, tokens, max(ranks), plans.outputs, rows, 1, moved[1], flops[1])
    if not summed:
        return first, last
    sum_bytes = parts + NUMBER * tokens * pivots * 2
    return first, Launch(sum_bytes, sum_bytes, 0, gpu.multiprocessors, overlapped=last.overlapped), last


def predict() -> dict[str, Any]:
    """Predict every layer of `SHAPES` on every GPU, as the results hold it.

    Times are in microseconds, one per entry of `tokens`; `waves` are those of PIFA's launches.
    """
    rows = [
        _row(name, gpu, model, layer, density)
        for name, gpu in GPUS.items()
        for model, layers in SHAPES.items()
        for density in DENSITIES
        for layer in layers
    ]
    return {
        "kind": "prediction by pifa-vllm bench predict, not a measurement",
        "dtype": "bfloat16",
        "assumptions": {
            "share of the memory's bandwidth": BANDWIDTH_SHARE,
            "bytes per clock that a multiprocessor reads": BYTES_PER_CLOCK,
            "share of the library's speed that our tiles reach": TRITON_SHARES,
            "microseconds per launch": LAUNCH * 1e6,
            "microseconds per overlapped launch": OVERLAPPED_LAUNCH * 1e6,
            "share of the peak per prefill tile (tokens x rows)": {
                family: {f"{t.tokens}x{t.rows}": t.speed for t in tiles[16]}
                for family, tiles in PREFILL.items()
                if family != "hip"
            },
        },
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "tokens": list(TOKENS),
        "rows": rows,
    }


def write(output: Path) -> None:
    """Write `predict` as JSON, a line per row."""
    text = json.dumps(predict()).replace('{"gpu"', '\n{"gpu"') + "\n"
    replace_text(output, text)


def layer_table(results: dict[str, Any], density: float) -> str:
    """Show dense time over PIFA time of one block's layers together: a row per GPU and model.

    Args:
        results: of `predict` or of `gpu_check`, whose rows have the same keys.
        density: one of its densities.
    """
    lines = []
    for gpu, model in itertools.product(results["gpus"], SHAPES):
        rows = [r for r in results["rows"] if (r["gpu"], r["model"], r["density"]) == (gpu, model, density)]
        pifa = list(zip(*(row["pifa_us"] for row in rows), strict=True))
        ranges: list[list[str]] = []
        # A measurement has one dense time.
        for kind in ("fast_dense_us", "dense_us"):
            dense = zip(*(row[kind] for row in rows if kind in row), strict=True)
            # It leaves out what it had no time for.
            ranges.append(
                [
                    "" if None in (*d, *p) else f"{sum(d) / sum(p):.2f}"
                    for d, p in zip(dense, pifa, strict=False)
                ]
            )
        fast, ratios = ranges
        if fast:
            ratios = [a if a == b else f"{a} to {b}" for a, b in zip(fast, ratios, strict=True)]
        lines.append([gpu, model, *ratios])
    title = (
        f"Dense time / PIFA time at density {density:g}, all linear layers of a block, by tokens, "
        f"{results['dtype']} ({results['kind']}):"
    )
    return f"{title}\n\n{markdown_table(['GPU', 'model', *map(str, results['tokens'])], lines)}"


def _row(name: str, gpu: GPU, model: str, layer: LayerShape, density: float) -> dict[str, Any]:
    ranks = layer_ranks(layer, density, pifa_rank)
    thin = layer_ranks(layer, density, lowrank_rank)
    pifa = [factored_launches(gpu, tokens, layer, ranks) for tokens in TOKENS]
    lowrank = [factored_launches(gpu, tokens, layer, thin, pivoting=False) for tokens in TOKENS]
    same_rank = [factored_launches(gpu, tokens, layer, ranks, pivoting=False) for tokens in TOKENS]
    return {
        "gpu": name,
        "model": model,
        "layer": layer.name,
        "density": density,
        "ranks": ranks,
        "lowrank_ranks": thin,
        "dense_us": [_us(gpu, [dense_launch(gpu, tokens, layer)]) for tokens in TOKENS],
        "fast_dense_us": [
            _us(gpu, [dense_launch(gpu, tokens, layer, TRITON_SHARES[1])]) for tokens in TOKENS
        ],
        "lowrank_us": [_us(gpu, launches) for launches in lowrank],
        "same_rank_us": [_us(gpu, launches) for launches in same_rank],
        "pifa_us": [_us(gpu, launches) for launches in pifa],
        "bytes": [sum(launch.bytes for launch in launches) for launches in pifa],
        "flops": [sum(launch.flops for launch in launches) for launches in pifa],
        "waves": [[_tiles(launch.programs, gpu.multiprocessors) for launch in launches] for launches in pifa],
    }


def layer_ranks(layer: LayerShape, density: float, rank: Callable[[int, int, float], int]) -> list[int]:
    """Return each shard's `pifa_rank` or `lowrank_rank`, down to a multiple of 16, as the compressor does."""
    return [rank(m, layer.n, density) // 16 * 16 for m in layer.out_features]


def _us(gpu: GPU, launches: Sequence[Launch]) -> float:
    return round(1e6 * sum(launch.seconds(gpu) for launch in launches), 2)


def _partial_bytes(tokens: int, pivots: int, splits: int) -> int:
    return tokens * pivots * (NUMBER if splits == 1 else 4 * splits)


def _prefill_launch(
    gpu: GPU, tokens: int, depth: int, tile: PrefillTile, row_tiles: int, splits: int, moved: int, flops: int
) -> Launch:
    """Whole waves of tiles; what a tile reads through L2 is part of its speed."""
    tiles = _tiles(tokens, tile.tokens) * row_tiles
    waves = _tiles(tiles * splits, gpu.multiprocessors)
    occupied = waves * gpu.multiprocessors * 2 * tile.tokens * tile.rows * (depth / splits) / tile.speed
    return Launch(moved, moved, flops, tiles * splits, occupied)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
