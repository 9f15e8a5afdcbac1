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

from pifa_vllm.bench.gpu.cost_model import TOKENS, layer_ranks
from pifa_vllm.bench.layer.forwards import Forward, Implementation, dense, pifa, reference
from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.factorization import lowrank_parameters, lowrank_rank, pifa_parameters, pifa_rank

# Of one implementation's weights: more than any L2 today.
_WORKING_SET = 256 * 2**20
_RUNS = 15


@torch.no_grad()
def layer_times(layer: LayerShape, density: float, seconds: float) -> dict[str, list[float | None]]:
    """Time the `implementations` in turn.

    Args:
        layer: the shape.
        density: kept / dense parameters.
        seconds: token counts that would begin later than this are left out.

    Returns:
        Medians in microseconds, one per entry of `TOKENS`, by name; None where they were left out.
    """
    deadline = time.monotonic() + seconds
    compared = implementations(layer, density, torch.bfloat16, "cuda")
    made = {item.name: item.copies(_WORKING_SET) for item in compared}
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


def implementations(
    layer: LayerShape, density: float, dtype: torch.dtype, device: str
) -> list[Implementation]:
    """List what is compared on one layer.

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
    """
    ranks, thin = (layer_ranks(layer, density, rank) for rank in (pifa_rank, lowrank_rank))

    def total(parameters: Callable[[int, int, int], int], of: Sequence[int]) -> int:
        return sum(parameters(m, layer.n, r) for r, m in zip(of, layer.out_features, strict=True))

    at = (dtype, device)
    kept = total(pifa_parameters, ranks)
    return [
        Implementation("dense", dtype, layer.m * layer.n, partial(dense, layer, *at)),
        Implementation(
            "lowrank", dtype, total(lowrank_parameters, thin), partial(_lowrank, layer, thin, *at)
        ),
        Implementation(
            "same_rank", dtype, total(lowrank_parameters, ranks), partial(_lowrank, layer, ranks, *at)
        ),
        Implementation("reference", dtype, kept, partial(reference, layer, ranks, *at)),
        Implementation("pifa", dtype, kept, partial(pifa, layer, ranks, *at)),
    ]


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


def _lowrank(layer: LayerShape, ranks: Sequence[int], dtype: torch.dtype, device: str) -> Forward:
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

    return forward
