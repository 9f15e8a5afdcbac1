"""A small report with nothing out of the ordinary."""

from __future__ import annotations

from typing import Any

from pifa_vllm.compression.report.schema import CompressionReport, Evaluation, LayerReport, ModuleReport
from pifa_vllm.factorization import pifa_parameters

SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (96, 64),
    "down_proj": (64, 96),
}


def module(kind: str, layer: int, rank: int, **changes: Any) -> ModuleReport:
    m, n = SHAPES[kind]
    part = "mlp" if kind in ("gate_proj", "down_proj") else "self_attn"
    values: dict[str, Any] = {
        "name": f"model.layers.{layer}.{part}.{kind}",
        "layer": layer,
        "kind": kind,
        "m": m,
        "n": n,
        "rank": rank,
        "density": pifa_parameters(m, n, rank) / (m * n),
        "output_error": 0.1 + 0.01 * layer,
        "weight_error": 3e-7,
        "max_coefficient": 1.04,
        "seconds": 0.2,
    }
    return ModuleReport(**{**values, **changes})


def sample_report(depth: int = 3, **changes: Any) -> CompressionReport:
    modules = [module(kind, layer, 24) for layer in range(depth) for kind in SHAPES]
    dense = sum(x.m * x.n for x in modules)
    kept = sum(pifa_parameters(x.m, x.n, x.rank) for x in modules)
    values: dict[str, Any] = {
        "model": "models/sample",
        "architecture": "LlamaForCausalLM",
        "method": "mpifa",
        "representation": "pifa",
        "density_target": kept / max(1, dense),
        "density": kept / max(1, dense),
        "dense_parameters": dense,
        "kept_parameters": kept,
        "dense_bytes": 4 * dense,
        "kept_bytes": 4 * kept,
        "model_dense_bytes": 4 * dense + 10_000,
        "model_kept_bytes": 4 * kept + 10_000,
        "dtype": "float32",
        "calibration": {"source": "text", "name": "some.txt", "samples": 16, "length": 1024, "seed": 3},
        "options": {"mix": 0.25, "density": {"density": 0.6, "rules": []}, "dtype": None},
        "fingerprint": "ab12" * 16,
        "seconds": 75.0,
        "cpu_seconds": 140.0,
        "peak_rss_bytes": 1_200_000_000,
        "versions": {"pifa-vllm": "0.1.0", "torch": "2.13.0"},
        "command": "pifa-vllm compress models/sample out --density 0.6",
        "created": "2025-01-02T03:04:05+00:00",
        "modules": modules,
        "layers": [LayerReport(layer=i, flow_error=0.05 * (i + 1), seconds=1.0) for i in range(depth)],
        "evaluation": [Evaluation(model="dense", value=19.26, data="some unseen text", tokens=16384)],
    }
    return CompressionReport(**{**values, **changes})
