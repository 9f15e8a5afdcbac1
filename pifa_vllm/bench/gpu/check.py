"""`make gpu-check`: the Triton kernels on the GPU at hand, first whether they are right, then how fast they are.

The times replace the predictions of `cost_model`: the rows have the same keys.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pifa_vllm.bench.gpu.cost_model import DENSITIES, TOKENS, layer_ranks
from pifa_vllm.bench.gpu.layers import capture, layer_times
from pifa_vllm.bench.shapes import SHAPES
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.compression.options import FACTORS
from pifa_vllm.errors import PifaError
from pifa_vllm.factorization import pifa_rank
from pifa_vllm.ops import Matrix, pifa_linear, pivot_columns_linear
from pifa_vllm.ops.reference import pifa_linear_reference
from pifa_vllm.ops.triton import configs, decode, partials, prefill
from pifa_vllm.quantization import round_to_nearest

# Relative to the largest output, against float64 on the rounded factors; y_p is rounded in between.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# (ranks, out_features, n); each odd one has kernels compiled for itself, so they go through one dtype.
ODD_SHAPES = (
    ((0,), (5,), 5),
    ((1,), (1,), 1),
    ((5,), (5,), 123),
    ((5,), (123,), 123),
    ((5, 0, 123), (5, 1, 130), 123),
    ((41,), (576,), 1536),
)
REAL_SHAPES = (
    ((1184,), (4096,), 4096),
    ((1184, 448, 448), (4096, 1024, 1024), 4096),
    ((1664, 1664), (11008, 11008), 4096),
)
TOKENS_TO_CHECK = (1, 2, 5, 16, 17, 64, 65, 123, 300)
MOST_TOKENS = 16_384


def gpu_check(output: Path, *, seconds: float = 420.0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Check the kernels and time the layers of `SHAPES`, in less than 8 minutes.

    Args:
        output: JSON file of the results.
        seconds: cases that would begin later than this are left out, which the file says (null).
        say: receives progress.

    Raises:
        PifaError: if there is no GPU, or a kernel's output is wrong.
    """
    if not torch.cuda.is_available():
        raise PifaError("make gpu-check: expected a GPU that torch can use, found none.")
    start = time.monotonic()
    checked = check_values("cuda") + check_quantized("cuda") + check_graph() + check_compile("cuda")
    checked += check_plans("cuda", configs.describe(torch.cuda.current_device()))
    say(f"{checked} outputs are right ({time.monotonic() - start:.0f} s)")
    name = torch.cuda.get_device_name()
    rows = []
    for model, density in itertools.product(SHAPES, DENSITIES):
        for layer in SHAPES[model]:
            left = seconds - (time.monotonic() - start)
            row = {"gpu": name, "model": model, "layer": layer.name, "density": density}
            rows.append(
                row | {"ranks": layer_ranks(layer, density, pifa_rank)} | layer_times(layer, density, left)
            )
            say(
                f"{model} {layer.name} {density:g}: pifa_us={rows[-1]['pifa_us']} dense_us={rows[-1]['dense_us']}"
            )
    properties = torch.cuda.get_device_properties(0)
    results = {
        "kind": "measurement",
        "dtype": "bfloat16",
        "gpus": {
            name: {
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory,
            }
        },
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "checked": checked,
        "tokens": list(TOKENS),
        "shapes": {model: [asdict(layer) for layer in layers] for model, layers in SHAPES.items()},
        "rows": rows,
        "seconds": round(time.monotonic() - start),
    }
    text = json.dumps(results).replace('{"gpu"', '\n{"gpu"') + "\n"
    replace_text(output, text)
    return results


def check_values(device: str) -> int:
    """Compare `pifa::linear` with float64 on odd and real shapes; returns how many outputs were compared.

    Memory is filled with NaN before the kernels get it, so that what they do not write shows.

    Raises:
        PifaError: naming the first shape that is wrong.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    checked = 0
    try:
        cases = [
            *itertools.product(ODD_SHAPES, (torch.bfloat16,), TOKENS_TO_CHECK),
            *itertools.product(REAL_SHAPES, TOLERANCE, TOKENS_TO_CHECK),
        ]
        for (ranks, sizes, n), dtype, tokens in cases:
            factors = random_factors(ranks, sizes, n, dtype, device)
            x = torch.randn(tokens, n, device=device).to(dtype)
            bias = torch.randn(sum(sizes), device=device).to(dtype) if tokens % 2 else None
            y = pifa_linear(x, *factors, ranks, sizes, bias)
            expected = _float64(x, *factors, ranks, sizes, bias)
            _compare(y, expected, f"ranks {ranks}, out_features {sizes}, n {n}, {tokens} tokens")
            checked += 1
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return checked


def check_plans(device: str, gpu: configs.Device, models: Sequence[str] = ("llama2-7b", "llama3-8b")) -> int:
    """Compare every plan that serving can choose with float64; returns how many outputs were compared.

    That is one token count per plan, up to `MOST_TOKENS`, of each layer at density 0.5 in bfloat16. The largest
    comes first, as in vLLM, and nothing may be compiled after it.

    Raises:
        PifaError: naming the first case that is wrong.
    """
    checked = 0
    for layer in (layer for model in models for layer in SHAPES[model]):
        n, sizes = layer.n, layer.out_features
        ranks = layer_ranks(layer, 0.5, pifa_rank)
        factors = random_factors(ranks, sizes, n, torch.bfloat16, device)
        counts: dict[object, int] = {}
        for tokens in configs.buckets(MOST_TOKENS):
            counts[configs.plan_plain(gpu, 16, tokens, n, ranks, sizes)] = tokens
        compiled = None
        for tokens in sorted({*counts.values(), MOST_TOKENS}, reverse=True):
            x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
            y = pifa_linear(x, *factors, ranks, sizes)
            case = f"{layer.name}, ranks {tuple(ranks)}, out_features {sizes}, n {n}, {tokens} tokens"
            # A part of the tokens at a time: float64 takes four times the memory.
            for part, rows in zip(torch.split(y, 1024), torch.split(x, 1024), strict=True):
                _compare(part, _float64(rows, *factors, ranks, sizes, None), case)
            compiled = compiled or _variants()
            if _variants() != compiled:
                raise PifaError(
                    f"gpu-check: {case}: a kernel was compiled after the call with the most tokens."
                )
            checked += 1
    return checked


def _variants() -> int:
    """Count what Triton has compiled of the kernels for plain factors."""
    kernels = (decode.pivot_kernel, decode.output_kernel, prefill.pivot_kernel, prefill.output_kernel)
    caches = (cache for kernel in (*kernels, partials.sum_kernel) for cache in kernel.device_caches.values())
    return sum(len(cache[0]) for cache in caches)


def check_quantized(device: str) -> int:
    """Compare quantized factors of every kind with what they stand for; returns how many outputs were compared.

    Raises:
        PifaError: naming the first case that is wrong.
    """
    cases = [
        *itertools.product(ODD_SHAPES, (torch.bfloat16,), FACTORS.items(), TOKENS_TO_CHECK),
        *itertools.product(REAL_SHAPES, TOLERANCE, FACTORS.items(), TOKENS_TO_CHECK),
    ]
    for (ranks, sizes, n), dtype, (name, kind), tokens in cases:
        pivot_weight, flat, out_rows = random_factors(ranks, sizes, n, torch.float32, device)
        rest = [(m - r, r) for r, m in zip(ranks, sizes, strict=True)]
        matrices = torch.split(flat, [rows * r for rows, r in rest])
        pivots = round_to_nearest(pivot_weight, kind.dtype, kind.group)
        others = [
            round_to_nearest(matrix.view(shape), kind.coefficient_dtype, kind.group)
            for matrix, shape in zip(matrices, rest, strict=True)
        ]
        x = torch.randn(tokens, n, device=device).to(dtype)
        bias = torch.randn(sum(sizes), device=device).to(dtype) if tokens % 2 else None
        numbers, scales = (
            torch.cat([getattr(matrix, part).flatten() for matrix in others]) for part in ("numbers", "scale")
        )
        values = torch.cat([matrix.values().flatten() for matrix in others])
        expected = _float64(x, pivots.values(), values, out_rows, ranks, sizes, bias)
        factors = (pivots.numbers, numbers, out_rows, ranks, sizes, bias, pivots.scale, scales, kind.group)
        y = pifa_linear(x, *factors)
        case = f"{name}, ranks {ranks}, out_features {sizes}, n {n}, {tokens} tokens"
        _compare(y, expected, case, rounded=device == "cpu")
    m, n, rank = 1537, 576, 400
    columns = itertools.product(TOLERANCE, FACTORS.items(), TOKENS_TO_CHECK)
    for dtype, (name, kind), tokens in columns:
        weight = round_to_nearest(torch.randn(m, rank, device=device), kind.dtype, kind.group)
        remaining = round_to_nearest(
            torch.rand(rank, n - rank, device=device) / rank**0.5, kind.coefficient_dtype, kind.group
        )
        order = torch.randperm(n, device=device).to(torch.int32)
        x = torch.randn(tokens, n, device=device).to(dtype)
        y = pivot_columns_linear(
            x,
            Matrix(weight.numbers, weight.scale, kind.group),
            Matrix(remaining.numbers, remaining.scale, kind.group),
            order,
        )
        ordered = x.double()[:, order.long()]
        y_p = ordered[:, :rank] + ordered[:, rank:] @ remaining.values().double().T
        _compare(
            y,
            y_p @ weight.values().double().T,
            f"{name}, pivot columns, {tokens} tokens",
            rounded=device == "cpu",
        )
    return len(cases) + len(TOLERANCE) * len(FACTORS) * len(TOKENS_TO_CHECK)


def check_graph() -> int:
    """Replay captured calls on other inputs; returns how many outputs were compared."""
    ranks, sizes, n = (1184, 448, 448), (4096, 1024, 1024), 4096
    factors = random_factors(ranks, sizes, n, torch.bfloat16, "cuda")
    for tokens in TOKENS_TO_CHECK:
        x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
        graph, y = capture(partial(pifa_linear, x, *factors, ranks, sizes))
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = pifa_linear(x, *factors, ranks, sizes)
        if not torch.equal(y, expected):
            raise PifaError(
                f"gpu-check: {tokens} tokens: a CUDA graph's replay differs from the call itself."
            )
    return len(TOKENS_TO_CHECK)


def check_compile(device: str) -> int:
    """Call a compiled layer with many token counts; returns how many outputs were compared."""
    ranks, sizes, n = (448,), (1024,), 1024
    factors = random_factors(ranks, sizes, n, torch.bfloat16, device)
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(
        lambda x: pifa_linear(x * 2, *factors, ranks, sizes), backend=backend, fullgraph=True, dynamic=True
    )
    counts = [tokens for tokens in TOKENS_TO_CHECK if tokens > 1]
    with torch.no_grad():
        for tokens in counts:
            x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
            y = compiled(x)
            _compare(y, _float64(x * 2, *factors, ranks, sizes, None), f"compiled, {tokens} tokens")
    if graphs != 1:
        raise PifaError(f"gpu-check: torch.compile: expected one graph for all token counts, found {graphs}.")
    return len(counts)


def random_factors(
    ranks: Sequence[int], sizes: Sequence[int], n: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random pivot_weight, coefficients (of at most 1) and out_rows, as `pifa_linear` takes them."""
    pivot_weight = torch.randn(sum(ranks), n, device=device) / n**0.5
    numbers = sum((m - r) * r for r, m in zip(ranks, sizes, strict=True))
    coefficients = torch.rand(numbers, device=device) * 2 - 1
    out_rows = torch.randperm(sum(sizes), device=device).to(torch.int32)
    return pivot_weight.to(dtype), coefficients.to(dtype), out_rows


def _float64(
    x: Tensor,
    pivot_weight: Tensor,
    coefficients: Tensor,
    out_rows: Tensor,
    ranks: Sequence[int],
    sizes: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    wide = None if bias is None else bias.double()
    factors = pivot_weight.double(), coefficients.double()
    return pifa_linear_reference(x.double(), *factors, out_rows, ranks, sizes, wide)


def _compare(y: Tensor, expected: Tensor, case: str, *, rounded: bool = False) -> None:
    # On CPUs quantized factors meet activations of 16 bits.
    tolerance = max(TOLERANCE[y.dtype], 1e-3 if rounded else 0.0)
    error = float((y.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    # NaN compares as false.
    if not error <= tolerance:
        raise PifaError(
            f"gpu-check: pifa::linear, {case}, {y.dtype}: expected float64's result within {tolerance:g} "
            f"of its largest output, found an error of {error:g}."
        )
