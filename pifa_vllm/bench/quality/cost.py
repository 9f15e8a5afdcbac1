"""What a token costs in the decoder layers' linear modules: FLOPs, and bytes that are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pifa_vllm.bench.quality.plan import Variant
from pifa_vllm.checkpoint import Checkpoint, Shards, is_pifa
from pifa_vllm.checkpoint.summary import dense_weights
from pifa_vllm.compression.report.record import read_report
from pifa_vllm.compression.report.schema import REPORT_NAME

# Of a number that is kept as it is: bfloat16, in which models are served, whatever the files hold.
_BITS = 16


def cost(directory: Path, variant: Variant | None) -> dict[str, Any]:
    """Count, without a measurement.

    Embeddings, norms and the output head are the same for all and left out.

    Args:
        directory: the checkpoint.
        variant: what it is; None is the dense model.

    Raises:
        CheckpointError: if the directory is damaged.

    Returns:
        `kept_density`, `flops_per_token` and `bytes`. Plain low rank, stored as its dense product, counts as the
        two factors it stands for. 2:4 counts as half of the FLOPs, which hardware that knows it comes near to.
    """
    if is_pifa(directory):
        checkpoint = Checkpoint.open(directory)
        modules = checkpoint.modules.values()
        dense = sum(m * n for m, n in checkpoint.linear.values())
        kept = dense - sum(x.m * x.n - x.parameters for x in modules)
        # A pivot row's index is an int32.
        nbytes = kept * _BITS / 8 + 4 * sum(x.rank for x in modules)
        if checkpoint.config.factors is not None:
            of_linear = tuple(f"{name}." for name in checkpoint.linear)
            entries = checkpoint.shards.entries.items()
            nbytes = sum(
                x.nbytes for name, x in entries if name.startswith(of_linear) and not name.endswith(".bias")
            )
        return _figures(kept, dense, nbytes, 1.0)
    dense = sum(math.prod(entry.shape) for _, entry in dense_weights(Shards(directory)))
    if (directory / REPORT_NAME).is_file():
        report = read_report(directory)
        return _figures(report.kept_parameters, report.dense_parameters, report.kept_parameters * 2, 1.0)
    bits, flops = (_BITS, 1.0) if variant is None else _rival(variant)
    return _figures(dense, dense, dense * bits / 8, flops)


def _rival(variant: Variant) -> tuple[float, float]:
    """Bits of a number, and the share of the dense model's FLOPs."""
    if variant.rival in ("round", "gptq"):
        return variant.bits + _BITS / variant.group, 1.0
    if variant.rival is not None:
        # Of four numbers two, with two bits each for their places.
        return (2 * _BITS + 4) / 4, 0.5
    return variant.number_bits or _BITS, variant.flops_share


def _figures(kept: int, dense: int, nbytes: float, flops_share: float) -> dict[str, Any]:
    return {
        "kept_density": kept / dense,
        "flops_per_token": round(2 * kept * flops_share),
        "bytes": round(nbytes),
    }
