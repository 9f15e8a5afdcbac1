"""What a call of the GPU layer costs the processor before the GPU is asked: checks, plans and grids.

No GPU is needed: launches and allocations are replaced by nothing. These are the same for any Triton kernel, as are
torch's dispatch and setting the current device, which are left out as well.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pifa_vllm.bench.gpu.cost_model import layer_ranks
from pifa_vllm.bench.machine import describe_machine
from pifa_vllm.bench.shapes import SHAPES
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.factorization import pifa_rank
from pifa_vllm.ops.linear import check_arguments
from pifa_vllm.ops.triton import decode, linear, partials, prefill, quantized
from pifa_vllm.ops.triton.configs import Device

TOKENS = (1, 64, 1024)
_CALLS, _ROUNDS = 1000, 9


class _Nothing:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(_always, None)


@contextlib.contextmanager
def launches(kernel_of: Callable[[Any], Any], device: Device) -> Iterator[None]:
    """Let the layer run without a GPU, with something else in each kernel's place.

    Args:
        kernel_of: given a kernel, returns what is indexed with a grid and called in its place.
        device: the GPU that is planned for.
    """
    nowhere = contextlib.nullcontext()
    # Plain functions: a mock that is called takes longer than what is measured.
    replaced: list[tuple[Any, str, Any]] = [
        (linear, "describe", functools.partial(_always, device)),
        (linear, "_launches", {}),
        (torch.cuda, "device", functools.partial(_always, nowhere)),
        (torch.cuda, "is_current_stream_capturing", functools.partial(_always, False)),
    ]
    for module in (decode, partials, prefill, quantized):
        for name in ("pivot_kernel", "output_kernel", "sum_kernel"):
            if kernel := getattr(module, name, None):
                replaced.append((module, name, kernel_of(kernel)))
    with contextlib.ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def _always(value: Any, *arguments: Any, **options: Any) -> Any:
    return value


def host_times(command: str) -> dict[str, Any]:
    """Measure the layers of LLaMA-2-7B at density 0.5 in bfloat16, planned for an H100.

    Returns:
        Per layer and token count the microseconds of one call of `linear_cuda`, of `check_arguments`, and of the
        first call, which plans for as many tokens and fewer: median, least and most of several rounds.
    """
    rows = []
    allocated = torch.empty(1, 1, 1)
    # The CPU's allocator asks the system for every large tensor; CUDA's keeps them.
    allocated.new_empty = allocate = functools.partial(_always, allocated)  # type: ignore[assignment]
    for layer in SHAPES["llama2-7b"]:
        ranks = layer_ranks(layer, 0.5, pifa_rank)
        rest = sum((m - r) * r for r, m in zip(ranks, layer.out_features, strict=True))
        factors: list[Tensor | None] = [
            torch.empty(sum(ranks), layer.n, dtype=torch.bfloat16),
            torch.empty(rest, dtype=torch.bfloat16),
            torch.empty(layer.m, dtype=torch.int32),
        ]
        for tokens in TOKENS:
            x = torch.empty(tokens, layer.n, dtype=torch.bfloat16)
            x.new_empty = allocate  # type: ignore[assignment]
            arguments: Any = (x, *factors, ranks, list(layer.out_features), None)
            with launches(lambda kernel: _Nothing(), Device("sm_90", 132)):
                start = time.perf_counter()
                linear.linear_cuda(*arguments)
                first = 1e6 * (time.perf_counter() - start)
                found = {
                    "call_us": _times(lambda: linear.linear_cuda(*arguments)),  # noqa: B023  # called here
                    "check_us": _times(lambda: check_arguments(*arguments)),  # noqa: B023
                }
            rows.append({"layer": layer.name, "tokens": tokens, **found, "first_us": round(first, 1)})
    return {
        "command": command,
        "machine": describe_machine(),
        "calls": _CALLS,
        "rounds": _ROUNDS,
        "rows": rows,
    }


def write(output: Path, command: str) -> None:
    """Write `host_times` as JSON."""
    replace_text(output, json.dumps(host_times(command), indent=1) + "\n")


def _times(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of a call."""
    found = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        found.append(1e6 * (time.perf_counter() - start) / _CALLS)
    return {
        "median": round(statistics.median(found), 2),
        "least": round(min(found), 2),
        "most": round(max(found), 2),
    }
