"""What a run will take in memory, disk and time, before it starts."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pifa_vllm.compression.decoder import GROUPS, DenseModel, LinearShape
from pifa_vllm.compression.flows import FlowShape
from pifa_vllm.compression.options import CompressOptions

# Interpreter, torch and transformers before any weight is read.
_BASE_BYTES = 550 << 20
# Float64 matrices of the widest inputs alive at once in a solve: G, H, the regularised G, its root, temporaries.
_SOLVE_MATRICES = 6
# Of a file with a layer's metrics.
_HEADER_BYTES = 4096
# Dense float64 decompositions run at a fraction of the speed of a large float32 product.
_SOLVE_SLOWDOWN = 6.0


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run.

    Attributes:
        memory_bytes: peak memory that must be there, besides mapped activations.
        mapped_bytes: activations mapped from disk: in RAM while it lasts, on the disk beyond.
        disk_bytes: peak use of the output's file system.
        seconds: wall time on this machine, from its measured float32 speed.
        tokens: calibration tokens.
    """

    memory_bytes: int
    mapped_bytes: int
    disk_bytes: int
    seconds: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        gib = 1 << 30
        minutes = self.seconds / 60
        wall = f"{minutes:.0f} min" if minutes >= 2 else f"{self.seconds:.0f} s"
        return (
            f"estimate: {self.memory_bytes / gib:.1f} GiB of memory, {self.disk_bytes / gib:.1f} GiB of disk, of "
            f"which {self.mapped_bytes / gib:.1f} GiB activations cached in RAM while there is room, about {wall} "
            f"for {self.tokens:,} calibration tokens (calibration sampling not counted)"
        )


def estimate(model: DenseModel, options: CompressOptions, kept: int) -> Estimate:
    """Estimate a run.

    Args:
        model: the dense model.
        options: of the run.
        kept: parameters that the compressible modules keep.
    """
    linears = model.linears()
    first = [x for x in linears if x.layer == 0]
    layer_parameters = sum(x.m * x.n for x in first)
    hidden, widest = model.hidden_size, max(x.n for x in first)
    context = next(x.n for x in first if x.module == "self_attn.o_proj")
    tokens = options.samples * options.length
    itemsize = FlowShape(1, 1, 1, getattr(torch, options.activation_dtype)).nbytes
    chunk = max(options.chunk_tokens, options.length)

    scratch = tokens * (widest + (context if context != widest else 0)) * itemsize
    mapped = 4 * tokens * hidden * itemsize + scratch
    stored = torch.empty(0, dtype=getattr(torch, options.dtype) if options.dtype else model.dtype).itemsize
    dense_parameters = sum(x.m * x.n for x in linears)
    other = sum(model.shards.entry(name).nbytes for name in model.untouched_tensors())
    output = (kept if options.representation == "pifa" else dense_parameters) * stored + other
    memory = (
        _BASE_BYTES
        + 3 * layer_parameters * 4
        + (2 * 4 + _SOLVE_MATRICES * 8) * widest * widest
        + 10 * chunk * widest * 4
        + max((model.shards.entry(name).nbytes for name in model.untouched_tensors()), default=0)
    )
    seconds = model.layers * _layer_flops(first, options, tokens) / _float32_speed(options.device)
    disk = mapped + output
    if options.uses_gradients:
        # Every layer's states, and what they say of its modules; then the flows, beside the latter.
        metrics = sum(8 * (min(x.m, x.n) + 1) for x in linears) + model.layers * _HEADER_BYTES
        if options.effective_metric == "outputs":
            metrics += sum(map(_outputs_bytes, linears))
        asked = options.effective_gradient_samples * options.length
        disk = metrics + max(disk, (model.layers + 3) * asked * hidden * itemsize)
        # One sequence's activations for the backward pass, the moments, and the head.
        activations = 14 * hidden + 6 * max(x.m for x in first)
        moments = sum(map(_outputs_bytes, first)) + 4 * (3 * hidden**2 + widest**2)
        head = 4 * int(model.config.vocab_size) * hidden
        memory = max(
            memory, _BASE_BYTES + moments + max(4 * (layer_parameters + options.length * activations), head)
        )
    if options.calibration == "self":
        # The whole model samples before the first layer is read.
        memory = max(memory, _BASE_BYTES + sum(entry.nbytes for entry in model.shards.entries.values()))
    return Estimate(memory, mapped, disk, seconds, tokens)


def _outputs_bytes(linear: LinearShape) -> int:
    """Of a module's S, see `sensitivity`."""
    return 4 * (linear.m if linear.m > linear.n else linear.m**2)


def _layer_flops(linears: list[LinearShape], options: CompressOptions, tokens: int) -> float:
    forward = 2.0 * 2.0 * tokens * sum(x.m * x.n for x in linears)  # two flows
    context = next(x.n for x in linears if x.module == "self_attn.o_proj")
    attention = 2.0 * 2.0 * tokens * options.length * context
    by_module = {x.module: x for x in linears}
    widths = [by_module[modules[0]].n for modules in GROUPS.values()]
    moments = sum(2.0 * 1.7 * tokens * n * n for n in widths)
    if options.uses_gradients:
        asked = options.effective_gradient_samples * options.length
        # Forward, and forward and backward once more, without gradients of the weights.
        forward += 3.0 * 2.0 * asked * sum(x.m * x.n for x in linears)
        moments += sum(1.3 / 4 * asked * _outputs_bytes(x) for x in linears) + sum(
            1.3 * asked * n**2 for n in widths
        )
    # Cholesky, triangular solves, one eigendecomposition on the smaller side, pivots.
    solves = sum(4.0 * x.n**3 + 12.0 * min(x.m, x.n) ** 3 + 4.0 * x.m * x.n * min(x.m, x.n) for x in linears)
    return forward + attention + moments + _SOLVE_SLOWDOWN * solves


def _float32_speed(device: str) -> float:
    """FLOP/s of a 1536-wide float32 product, the best of four."""
    a = torch.randn(1536, 1536, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * 1536**3 / best
