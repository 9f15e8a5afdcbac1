"""Perplexity and cost of compression, by method and density."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pifa_vllm.bench.machine import describe_machine
from pifa_vllm.checkpoint import read_json
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.compression.report.record import read_report
from pifa_vllm.errors import PifaError
from pifa_vllm.evaluate.perplexity import perplexity

# Name in the tables: options. The baselines are counted as they are usually stored.
VARIANTS = {
    # It looks at no inputs: the sample only feeds the report's errors.
    "svd": ("--method", "svd", "--representation", "lowrank", "--samples", "1"),
    "svd-llm": ("--method", "svd-llm", "--representation", "lowrank"),
    "svd-llm-pifa": ("--method", "svd-llm"),
    "mpifa": ("--method", "mpifa"),
    "mpifa-exact-no-feedback": ("--method", "mpifa-exact", "--feedback", "0"),
    "mpifa-exact": ("--method", "mpifa-exact"),
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
) -> None:
    """Compress by every variant at every density and measure each result.

    Rows that are in `output` already are kept. Each compression is a process of its own, so that its CPU time and
    peak memory are its own.

    Args:
        model: dense model directory.
        text: evaluation text, kept apart from the calibration text.
        output: JSON file of results, written after every row; another measurement's file is replaced.
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
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PifaError(f"{text}: cannot be read as UTF-8 text ({error}).") from error
    subject = {
        "model": model.name,
        "text": text.name,
        "seqlen": seqlen,
        "max_windows": max_windows,
        "compress_options": compress_options,
    }
    rows = _finished_rows(output, subject)
    # Checkpoints of another model or of other options are not to be taken for these.
    key = hashlib.sha256(json.dumps([str(model.resolve()), compress_options]).encode()).hexdigest()[:8]

    def finished(variant: str, density: float) -> bool:
        return any((row["variant"], row["density"]) == (variant, density) for row in rows)

    def measure(directory: Path) -> dict[str, Any]:
        result = perplexity(directory, content, seqlen=seqlen, max_windows=max_windows)
        gc.collect()
        kept = ("perplexity", "nll", "standard_error", "windows", "scored_tokens")
        return {key: value for key, value in result.to_dict().items() if key in kept}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        results = json.dumps(
            {"command": command, **subject, "machine": describe_machine(), "rows": rows},
            indent=1,
            allow_nan=False,
        )
        replace_text(output, results + "\n")
        say(json.dumps(row))

    if not finished("dense", 1.0):
        keep({"variant": "dense", "density": 1.0, **measure(model)})
    for density in densities:
        for variant in variants:
            if finished(variant, density):
                continue
            directory = work_dir / f"{variant}-{density:g}-{key}"
            if not directory.exists():
                _compress(model, directory, variant, density, compress_options)
            report = read_report(directory)
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
                    "max_weight_error": max((x.weight_error for x in modules), default=0.0),
                    "max_coefficient": max((x.max_coefficient for x in modules), default=0.0),
                    "last_flow_error": report.layers[-1].flow_error,
                }
            )


def _finished_rows(output: Path, subject: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier attempt at the same measurement; none of any other."""
    if not output.is_file():
        return []
    earlier = read_json(output)
    rows: list[dict[str, Any]] = earlier.get("rows", [])
    return rows if all(earlier.get(name) == value for name, value in subject.items()) else []


def _compress(model: Path, directory: Path, variant: str, density: float, options: list[str]) -> None:
    command = [sys.executable, "-m", "pifa_vllm", "compress", str(model), str(directory)]
    command += ["--density", f"{density:g}", *options, *VARIANTS[variant]]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise PifaError(f"{directory}: `{' '.join(command)}` ended with exit code {done.returncode}.")
