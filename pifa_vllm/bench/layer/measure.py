"""The layer benchmark: PIFA against dense, plain low rank and the reference's forward, layer by layer.

Everything that is compared runs in turn within one loop (A B C A B C ...), so that whatever else a shared machine
does hits all of it alike; medians are reported. Each implementation goes through copies of its weights that
together exceed the last cache, as a model with many layers does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from pifa_vllm import ops
from pifa_vllm.bench.layer.forwards import (
    Forward,
    Implementation,
    dense,
    pifa,
    quantized,
    random_matrix,
    reference,
)
from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.compression.options import FACTORS
from pifa_vllm.errors import PifaError
from pifa_vllm.factorization import lowrank_parameters, lowrank_rank, pifa_parameters, pifa_rank
from pifa_vllm.ops import Matrix
from pifa_vllm.quantization import round_to_nearest

# Beyond any last-level cache of a single socket that is common today.
_WORKING_SET = 192 * 2**20
_SECONDS = 0.5  # per case and implementation, unless that is fewer runs than _MIN_RUNS
_MIN_RUNS, _MAX_RUNS = 5, 60
_CEILING_SECONDS = 2.0


@dataclass(frozen=True)
class Row:
    """One implementation in one case.

    Attributes:
        layer: name of the shape.
        n: input features.
        out_features: m per shard.
        tokens: rows of x.
        density: kept / dense parameters of the compressed implementations of this case.
        implementation: what ran (see `implementations`).
        dtype: of activations, and of weights that are not quantized.
        parameters: numbers that it multiplies with.
        ms: median over the runs.
        fastest_ms: fastest run.
        runs: number of runs.
        gbytes_per_s: weight bytes per second.
        gflops: arithmetic per second, 2 per number and token.
    """

    layer: str
    n: int
    out_features: tuple[int, ...]
    tokens: int
    density: float
    implementation: str
    dtype: str
    parameters: int
    ms: float
    fastest_ms: float
    runs: int
    gbytes_per_s: float
    gflops: float


def implementations(shape: LayerShape, density: float, dtypes: Sequence[torch.dtype]) -> list[Implementation]:
    """List what is compared on one layer.

    - "dense": F.linear. "dense-vllm": vLLM's linear for this CPU (packed oneDNN), where vLLM is installed.
      "dense-ours": the weight streamed by our kernel.
    - "pifa": `pifa::linear` at the rank that the density allows.
    - "reference": what the paper's implementation runs at that rank, two F.linear and two index_copy_ per module.
    - "pifa-int8", "pifa-int4": the same with quantized factors, at the same rank. "dense-int8-vllm": 8-bit weights
      and activations, as vLLM multiplies them on this CPU.
    - "lowrank-rank", "lowrank-density": two plain factors in our kernels, at PIFA's rank (more parameters) and at
      the density (lower rank).

    Args:
        shape: of the layer.
        density: kept / dense parameters.
        dtypes: of weights and activations.
    """
    n, ms = shape.n, shape.out_features
    ranks = [pifa_rank(m, n, density) for m in ms]
    plain = [lowrank_rank(m, n, density) for m in ms]
    kept = sum(pifa_parameters(m, n, r) for r, m in zip(ranks, ms, strict=True))
    found = []
    for dtype in dtypes:
        found += [
            Implementation("dense", dtype, shape.m * n, partial(dense, shape, dtype)),
            Implementation("dense-ours", dtype, shape.m * n, partial(_dense_ours, shape, dtype)),
            Implementation("pifa", dtype, kept, partial(pifa, shape, ranks, dtype)),
            Implementation("reference", dtype, kept, partial(reference, shape, ranks, dtype)),
        ]
        if _vllm_linear() is not None:
            whole = ("dense-vllm", _dense_vllm, None), ("dense-int8-vllm", _dense_int8_vllm, 8.0)
            found += [
                Implementation(name, dtype, shape.m * n, partial(make, shape, dtype), bits)
                for name, make, bits in whole
            ]
        for name in ("int8", "int4"):
            kind = FACTORS[name]
            # With pivot columns the coefficients are [r, n - r], with rows [m - r, r].
            rest = sum(r * ((n if min(ms) > n else m) - r) for r, m in zip(ranks, ms, strict=True))
            bits = (kind.bits * (kept - rest) + kind.coefficient_bits * rest) / kept + 16 / (kind.group or n)
            found.append(
                Implementation(f"pifa-{name}", dtype, kept, partial(quantized, shape, ranks, kind), bits)
            )
        for name, low in (("lowrank-rank", ranks), ("lowrank-density", plain)):
            parameters = sum(lowrank_parameters(m, n, r) for r, m in zip(low, ms, strict=True))
            found.append(Implementation(name, dtype, parameters, partial(_lowrank, shape, low, dtype)))
    return found


@torch.inference_mode()
def measure(shape: LayerShape, tokens: int, density: float, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """Time everything on one layer and number of tokens, interleaved.

    Raises:
        PifaError: if an implementation's output is not that of the others with the same weights' shape.
    """
    compared = implementations(shape, density, dtypes)
    instances = [item.copies(_WORKING_SET) for item in compared]
    inputs = {dtype: torch.randn(tokens, shape.n).to(dtype) for dtype in dtypes}
    seconds: list[list[float]] = [[] for _ in compared]
    for item, forwards in zip(compared, instances, strict=True):
        y = forwards[0](inputs[item.dtype])
        if y.shape != (tokens, shape.m) or not bool(torch.isfinite(y).all()):
            raise PifaError(f"{shape.name}: {item.name} gave {list(y.shape)}, expected {[tokens, shape.m]}.")
    started, run = time.perf_counter(), 0
    while run < _MIN_RUNS or (run < _MAX_RUNS and time.perf_counter() - started < _SECONDS * len(compared)):
        for item, forwards, times in zip(compared, instances, seconds, strict=True):
            forward, x = forwards[run % len(forwards)], inputs[item.dtype]
            begin = time.perf_counter()
            forward(x)
            times.append(time.perf_counter() - begin)
        run += 1
    for item, times in zip(compared, seconds, strict=True):
        median = statistics.median(times)
        yield Row(
            layer=shape.name,
            n=shape.n,
            out_features=shape.out_features,
            tokens=tokens,
            density=density,
            implementation=item.name,
            dtype=str(item.dtype).removeprefix("torch."),
            parameters=item.parameters,
            ms=median * 1e3,
            fastest_ms=min(times) * 1e3,
            runs=len(times),
            gbytes_per_s=item.nbytes / median / 1e9,
            gflops=2 * item.parameters * tokens / median / 1e9,
        )


@torch.inference_mode()
def ceilings() -> dict[str, float]:
    """Measure what this machine can do at best: reading, copying, multiplying; medians.

    Returns:
        "read_gbytes_per_s" (a sum over 512 MiB), "copy_gbytes_per_s" (read and written bytes of a copy),
        "gemm_gflops" (a float32 product of 2048 x 4096 x 4096).
    """
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    a, b = torch.randn(2048, 4096), torch.randn(4096, 4096)

    def median(work: Callable[[], object]) -> float:
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=_CEILING_SECONDS).median

    nbytes = source.numel() * 4
    return {
        "read_gbytes_per_s": nbytes / median(source.sum) / 1e9,
        "copy_gbytes_per_s": 2 * nbytes / median(lambda: target.copy_(source)) / 1e9,
        "gemm_gflops": 2 * 2048 * 4096 * 4096 / median(lambda: linear(a, b)) / 1e9,
    }


def to_json(rows: Sequence[Row], machine: dict[str, Any], command: str) -> dict[str, Any]:
    """Everything of a run that goes into its results file."""
    return {"command": command, "machine": machine, "rows": [asdict(row) for row in rows]}


def _dense_ours(shape: LayerShape, dtype: torch.dtype) -> Forward:
    matrix = Matrix(random_matrix(shape.m, shape.n, dtype))
    return lambda x: ops.dense(x, matrix)


def _dense_vllm(shape: LayerShape, dtype: torch.dtype) -> Forward:
    dispatch = _vllm_linear()
    if dispatch is None:
        raise PifaError("vLLM is not installed.")
    holder = Module()
    holder.weight = Parameter(random_matrix(shape.m, shape.n, dtype), requires_grad=False)
    dispatch(holder, remove_weight=True)
    packed: Callable[..., Tensor] = holder.cpu_linear  # type: ignore[assignment]  # set by the line above
    return lambda x: packed(x, holder.weight, None)


def _dense_int8_vllm(shape: LayerShape, dtype: torch.dtype) -> Forward:
    """What vLLM's CPUInt8ScaledMMLinearKernel runs on oneDNN: weights by output, activations by token."""
    from vllm import _custom_ops as vllm_ops

    found = round_to_nearest(random_matrix(shape.m, shape.n, torch.float32), torch.int8, 0)
    weight_scale = found.scale.float()
    handler = vllm_ops.create_onednn_scaled_mm(found.numbers.T, weight_scale, dtype, True, False, 32)

    def forward(x: Tensor) -> Tensor:
        numbers, scale, zero = vllm_ops.onednn_scaled_int8_quant(x, None, None, True)
        # The handler keeps the scales' address and not the tensor.
        y = x.new_empty(len(x), len(weight_scale))
        vllm_ops.onednn_scaled_mm(handler, numbers, y, scale, zero, None, None)
        return y

    return forward


def _vllm_linear() -> Callable[..., None] | None:
    try:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    except ImportError:
        return None
    dispatch: Callable[..., None] = dispatch_cpu_unquantized_gemm
    return dispatch


def _lowrank(shape: LayerShape, ranks: Sequence[int], dtype: torch.dtype) -> Forward:
    factors = [
        (random_matrix(r, shape.n, dtype), random_matrix(m, r, dtype))
        for r, m in zip(ranks, shape.out_features, strict=True)
    ]

    def forward(x: Tensor) -> Tensor:
        parts: list[Tensor] = [torch.ops.pifa.lowrank(x, v, u) for v, u in factors]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    return forward
