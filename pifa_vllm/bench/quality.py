"""Perplexity and cost of compression, by method and density."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pifa_vllm.checkpoint.writer import CheckpointWriter
from pifa_vllm.compress.report_schema import REPORT_NAME, CompressionReport
from pifa_vllm.errors import PifaError
from pifa_vllm.evaluate.perplexity import perplexity

# Name in the tables: (method, representation). The baselines are counted as they are usually stored.
VARIANTS = {
    "svd": ("svd", "lowrank"),
    "svd-llm": ("svd-llm", "lowrank"),
    "svd-llm-pifa": ("svd-llm", "pifa"),
    "mpifa": ("mpifa", "pifa"),
    "mpifa-exact": ("mpifa-exact", "pifa"),
}


def quality(
    model: Path,
    text: Path,
    output: Path,
    work_dir: Path,
    *,
    variants: list[str],
    densities: list[float],
    compress_options: list[str],
    seqlen: int,
    max_windows: int,
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compress by every variant at every density and measure each result; finished rows are kept in `output`.

    Each compression is a process of its own, so that its CPU time and peak memory are its own.

    Args:
        model: dense model directory.
        text: evaluation text, kept apart from the calibration text.
        output: JSON file of results, written after every row.
        work_dir: for the checkpoints, which are kept.
        variants: keys of `VARIANTS`.
        densities: kept / dense parameters.
        compress_options: further options of `pifa-vllm compress`.
        seqlen: tokens per evaluation window.
        max_windows: evaluation windows.
        command: the command line, for the record.
        say: told of each row.

    Raises:
        PifaError: if a compression fails.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    content = text.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []

    def measure(directory: Path) -> dict[str, Any]:
        result = perplexity(directory, content, seqlen=seqlen, max_windows=max_windows)
        gc.collect()
        kept = ("perplexity", "nll", "standard_error", "windows", "scored_tokens")
        return {key: value for key, value in result.to_dict().items() if key in kept}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        CheckpointWriter(output, output.parent).write_json(
            output.name,
            {
                "command": command,
                "model": model.name,
                "text": text.name,
                "seqlen": seqlen,
                "machine": describe_machine(),
                "rows": rows,
            },
        )
        say(json.dumps(row))

    keep({"variant": "dense", "density": 1.0, **measure(model)})
    for density in densities:
        for variant in variants:
            directory = work_dir / f"{variant}-{density:g}"
            if not directory.exists():
                _compress(model, directory, variant, density, compress_options)
            report = CompressionReport.model_validate_json(
                (directory / REPORT_NAME).read_text(encoding="utf-8")
            )
            modules = [x for x in report.modules if not x.dense]
            keep(
                {
                    "variant": variant,
                    "density": density,
                    "kept_density": report.density,
                    **measure(directory),
                    "cpu_seconds": report.cpu_seconds,
                    "seconds": report.seconds,
                    "peak_rss_bytes": report.peak_rss_bytes,
                    "max_weight_error": max(x.weight_error for x in modules),
                    "max_coefficient": max(x.max_coefficient for x in modules),
                    "last_flow_error": report.layers[-1].flow_error,
                }
            )
    return {"rows": rows}


def describe_machine() -> dict[str, Any]:
    """Name what figures depend on: processor, cores, threads, versions."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _compress(model: Path, directory: Path, variant: str, density: float, options: list[str]) -> None:
    method, representation = VARIANTS[variant]
    command = [sys.executable, "-m", "pifa_vllm", "compress", str(model), str(directory)]
    command += ["--method", method, "--representation", representation, "--density", f"{density:g}", *options]
    if method == "svd":
        command += ["--samples", "1"]  # it looks at no inputs; they only feed the report's errors
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise PifaError(f"{directory}: `{' '.join(command)}` ended with exit code {done.returncode}.")
