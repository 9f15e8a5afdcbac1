"""One layer on a GPU: dense, plain low rank, the reference's forward and ours, timed in turn.

Each implementation runs as a CUDA graph over copies of its weights that exceed the L2 cache, as a model's layers
do, so that neither launches from Python nor cached weights are measured.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pifa_vllm.bench.cost_model import TOKENS, layer_ranks
from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.factorization import lowrank_rank, pifa_rank
from pifa_vllm.ops import pifa_linear

# Of one implementation's weights: more than any L2 today.
_WORKING_SET = 256 * 2**20
_RUNS = 15

Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def layer_times(layer: LayerShape, density: float, seconds: float) -> dict[str, list[float | None]]:
    """Time what `forwards` makes in turn.

    Args:
        layer: the shape.
        density: kept / dense parameters.
        seconds: token counts that would begin later than this are left out.

    Returns:
        Medians in microseconds, one per entry of `TOKENS`, by name; None where they were left out.
    """
    deadline = time.monotonic() + seconds
    made = forwards(layer, density, torch.bfloat16, "cuda", lambda size: max(1, -(-_WORKING_SET // size)))
    times: dict[str, list[float | None]] = {f"{name}_us": [] for name in made}
    for tokens in TOKENS:
        if time.monotonic() > deadline:
            for found in times.values():
                found.append(None)
            continue
        x = torch.randn(tokens, layer.n, device="cuda", dtype=torch.bfloat16)
        graphs = {name: capture(partial(_through, copies, x))[0] for name, copies in made.items()}
        samples: dict[str, list[float]] = {name: [] for name in made}
        for _, name in itertools.product(range(_RUNS), made):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no annotations here
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            samples[name].append(1e3 * begin.elapsed_time(end) / len(made[name]))
        for name, measured in samples.items():
            times[f"{name}_us"].append(round(statistics.median(measured), 2))
    return times


def forwards(
    layer: LayerShape, density: float, dtype: torch.dtype, device: str, copies: Callable[[int], int]
) -> dict[str, list[Forward]]:
    """Make what is compared on one layer, several times, each with weights of its own.

    - "dense": F.linear.
    - "lowrank", "same_rank": two plain factors per shard in library products, all shards' first factors stacked, at
      the density and at PIFA's ranks.
    - "reference": what the paper's implementation runs, two F.linear and two index_copy_ per shard.
    - "pifa": `pifa::linear`.

    Args:
        layer: the shape.
        density: kept / dense parameters.
        dtype: of weights and activations.
        device: where the weights are.
        copies: number of copies by the bytes of one.
    """
    ranks, thin = (layer_ranks(layer, density, rank) for rank in (pifa_rank, lowrank_rank))
    made: dict[str, Callable[[], tuple[int, Forward]]] = {
        "dense": lambda: _dense(layer, dtype, device),
        "lowrank": lambda: _lowrank(layer, thin, dtype, device),
        "same_rank": lambda: _lowrank(layer, ranks, dtype, device),
        "reference": lambda: _reference(layer, ranks, dtype, device),
        "pifa": lambda: _pifa(layer, ranks, dtype, device),
    }
    found = {}
    for name, make in made.items():
        size, first = make()
        found[name] = [first, *(make()[1] for _ in range(copies(size) - 1))]
    return found


def random_factors(
    ranks: Sequence[int], sizes: Sequence[int], n: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random pivot_weight, coefficients (of at most 1) and out_rows, as `pifa_linear` takes them."""
    pivot_weight = torch.randn(sum(ranks), n, device=device) / n**0.5
    numbers = sum((m - r) * r for r, m in zip(ranks, sizes, strict=True))
    coefficients = torch.rand(numbers, device=device) * 2 - 1
    out_rows = torch.randperm(sum(sizes), device=device).to(torch.int32)
    return pivot_weight.to(dtype), coefficients.to(dtype), out_rows


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call into a CUDA graph; returns the graph and the tensors that its replay fills."""
    # The first call compiles, and lets the libraries allocate.
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


def _through(copies: Sequence[Forward], x: Tensor) -> list[Tensor]:
    return [forward(x) for forward in copies]


def _dense(layer: LayerShape, dtype: torch.dtype, device: str) -> tuple[int, Forward]:
    weight = torch.randn(layer.m, layer.n, dtype=dtype, device=device)
    return weight.nbytes, lambda x: linear(x, weight)


def _lowrank(layer: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str) -> tuple[int, Forward]:
    v = torch.randn(sum(ranks), layer.n, dtype=dtype, device=device)
    u = [
        torch.randn(m, r, dtype=dtype, device=device) for r, m in zip(ranks, layer.out_features, strict=True)
    ]

    def forward(x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], layer.m)
        parts = torch.split(linear(x, v), list(ranks), dim=1)
        for y_p, left, to in zip(parts, u, torch.split(y, list(layer.out_features), dim=1), strict=True):
            torch.mm(y_p, left.T, out=to)
        return y

    return v.nbytes + sum(left.nbytes for left in u), forward


def _reference(
    layer: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[int, Forward]:
    shards = []
    for r, m in zip(ranks, layer.out_features, strict=True):
        pivot_weight, coefficients, rows = random_factors((r,), (m,), layer.n, dtype, device)
        shards.append((pivot_weight, coefficients.view(m - r, r), rows[:r].long(), rows[r:].long()))

    def forward(x: Tensor) -> Tensor:
        outputs = []
        for pivot_weight, coefficients, pivots, rest in shards:
            y = x.new_empty(x.shape[0], pivots.numel() + rest.numel())
            y_p = linear(x, pivot_weight)
            y.index_copy_(1, pivots, y_p)
            outputs.append(y.index_copy_(1, rest, linear(y_p, coefficients)))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    return sum(w.nbytes + c.nbytes for w, c, _, _ in shards), forward


def _pifa(layer: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str) -> tuple[int, Forward]:
    factors = random_factors(ranks, layer.out_features, layer.n, dtype, device)
    size = factors[0].nbytes + factors[1].nbytes
    return size, lambda x: pifa_linear(x, *factors, ranks, layer.out_features)
