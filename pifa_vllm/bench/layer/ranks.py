"""What each tensor-parallel rank holds, and what it sends per token, for the ways to share out low-rank layers.

Nothing is measured here: the numbers of our own scheme are counted on the layouts that the plugin allocates, with
pivot rows drawn at random, those of the others follow from their definition. Traffic is what a rank sends in ring
collectives: 2 (t-1)/t numbers for each that is all-reduced, (t-1)/t for each that is gathered or reduce-scattered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pifa_vllm.bench.shapes import LAYERS, SHAPES, LayerShape
from pifa_vllm.bench.table import markdown_table
from pifa_vllm.factorization import pifa_rank
from pifa_vllm.plugin.column import ColumnLayout
from pifa_vllm.plugin.layout import Layout, Shard
from pifa_vllm.plugin.row import RowLayout

SIZES = (1, 2, 4, 8)
NUMBER = 2  # bytes
TILE = 16  # ranks are multiples of it, as `pifa-vllm compress` makes them

TITLES = {
    "dense": "dense",
    "replicated": "y_p computed by every rank",
    "refactorised": "each rank's slice factorised anew",
    "split": "pivots split, y_p gathered or reduce-scattered (ours)",
}


@dataclass(frozen=True)
class Share:
    """One scheme at one number of ranks, for all linear layers of the decoder.

    Attributes:
        scheme: of TITLES.
        ranks: t.
        bytes: that the fullest rank holds.
        part: of the dense layers' bytes on one rank.
        traffic: bytes that a rank sends per token.
        collectives: per token and decoder layer.
    """

    scheme: str
    ranks: int
    bytes: int
    part: float
    traffic: int
    collectives: int


def shares(model: str, density: float) -> list[Share]:
    """Count all schemes for a model of `bench.shapes`."""
    dense_bytes = LAYERS[model] * NUMBER * sum(layer.n * layer.m for layer in SHAPES[model])
    found = []
    for t in SIZES:
        for scheme in TITLES:
            layers = [_count(scheme, layer, density, t) for layer in SHAPES[model]]
            held = LAYERS[model] * NUMBER * sum(numbers for numbers, _ in layers)
            sent = LAYERS[model] * NUMBER * sum(s for _, s in layers)
            collectives = 0 if t == 1 else 6 if scheme == "split" else 2
            found.append(Share(scheme, t, held, held / dense_bytes, round(sent), collectives))
    return found


def results(models: Iterable[str], density: float, command: str) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "command": command,
        "density": density,
        "bytes_per_number": NUMBER,
        "models": {model: [asdict(share) for share in shares(model, density)] for model in models},
    }


def share_table(found: dict[str, Any], model: str) -> str:
    """Markdown: bytes per rank and traffic per token of each scheme."""
    rows = found["models"][model]
    sizes = sorted({row["ranks"] for row in rows})
    lines = []
    for scheme, title in TITLES.items():
        mine = {row["ranks"]: row for row in rows if row["scheme"] == scheme}
        held = [f"{mine[t]['bytes'] / 1e9:.2f} GB ({mine[t]['part']:.3f})" for t in sizes]
        last = mine[sizes[-1]]
        lines.append([title, *held, f"{last['traffic'] / 1e6:.2f} MB", str(last["collectives"])])
    sent = f"sent per token, t = {sizes[-1]}"
    return markdown_table(["scheme", *(f"t = {t}" for t in sizes), sent, "collectives per layer"], lines)


def _count(scheme: str, layer: LayerShape, density: float, t: int) -> tuple[int, float]:
    """Numbers that the fullest rank holds of a layer, and that it sends per token."""
    row = len(layer.out_features) == 1  # o_proj and down_proj
    reduced = 2 * (t - 1) / t * layer.m if row else 0.0
    if scheme == "dense":
        return sum(-(-m // t) for m in layer.out_features) * layer.n, reduced
    ranks = [pifa_rank(m, layer.n, density) // TILE * TILE for m in layer.out_features]
    if scheme == "split":
        numbers = max(_numbers(layout) for layout in _layouts(layer, ranks, t, row))
        return numbers, reduced + (t - 1) / t * sum(ranks)
    pairs = list(zip(layer.out_features, ranks, strict=True))
    if scheme == "replicated":
        # Column-parallel: all pivot rows everywhere. Row-parallel: y_p is a summand, so C is needed everywhere.
        one = layer.n // t if row else layer.n
        other = 1 if row else t
        return sum(r * one + (m - r) * r // other for m, r in pairs), reduced
    slices = [(m, layer.n // t) if row else (m // t, layer.n) for m, _ in pairs]
    held = 0
    for (m, n), r in zip(slices, ranks, strict=True):
        least = min(r, m, n)
        held += least * (m + n) - least * least
    return held, reduced


def _layouts(layer: LayerShape, ranks: list[int], t: int, row: bool) -> Iterable[Layout]:
    generator = torch.Generator().manual_seed(0)
    pivots = [
        torch.randperm(m, generator=generator)[:r].sort().values
        for m, r in zip(layer.out_features, ranks, strict=True)
    ]
    for i in range(t):
        shards = [
            Shard(f"module{j}", r, m, layer.n)
            for j, (m, r) in enumerate(zip(layer.out_features, ranks, strict=True))
        ]
        if row:
            inputs = (layer.n // t * i, layer.n // t * (i + 1))
            yield RowLayout(shards[0], inputs, i, t, _unused)
            continue
        outputs = [(m // t * i, m // t * (i + 1)) for m in layer.out_features]
        yield ColumnLayout(shards, outputs, pivots, i, t, _unused)


def _numbers(layout: Layout) -> int:
    shapes = layout.shapes()
    rows, columns = shapes["pivot_weight"]
    return rows * columns + shapes["coefficients"][0]


def _unused(y: Tensor) -> Tensor:
    raise NotImplementedError("layouts are counted here, not run")
