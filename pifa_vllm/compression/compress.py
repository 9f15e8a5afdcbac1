"""`pifa_vllm.compress`: from Python what `pifa-vllm compress` is on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pifa_vllm.compression.allocation import load_recipe, uniform
from pifa_vllm.compression.options import CompressOptions
from pifa_vllm.compression.pipeline import Compression
from pifa_vllm.compression.progress import Progress, make_progress
from pifa_vllm.compression.report.schema import CompressionReport, Method


def compress(
    model: str | Path,
    output: str | Path,
    *,
    density: float | str | Path,
    method: Method = CompressOptions.method,
    calibration: str | Path = CompressOptions.calibration,
    samples: int = CompressOptions.samples,
    length: int = CompressOptions.length,
    seed: int = CompressOptions.seed,
    dtype: str | None = CompressOptions.dtype,
    device: str = CompressOptions.device,
    progress: Progress | None = None,
    **options: Any,
) -> CompressionReport:
    """Compress a dense model into a PIFA checkpoint (MPIFA, arXiv 2501.19090, sections 3 and 4).

    Every linear layer of the decoder, q_proj to down_proj, is replaced by factors of low rank, layer by layer, so
    that one decoder layer is in memory at a time. Killed at any moment, the same call goes on at the first
    unfinished layer; `output` appears whole or not at all.

    Args:
        model: Hugging Face directory with safetensors weights of a LLaMA, Mistral, Qwen2 or Qwen3 model.
        output: checkpoint directory to create.
        density: kept / dense parameters of the linear layers, in (0, 1], or a YAML recipe file with densities by
            module and layer. What is kept never exceeds it.
        method: "mpifa-exact" (M as reduced-rank regression), "mpifa" (the paper's M), or a baseline, "svd-llm" or
            "svd".
        calibration: text file, .jsonl file, dataset name ("wikitext2", "c4", ...), or "self", the model's own
            samples.
        samples: calibration sequences.
        length: tokens per sequence.
        seed: of the sampling.
        dtype: storage dtype, "float32", "bfloat16" or "float16"; None keeps the model's. Everything is computed in
            float32 or float64.
        device: where to compute: "cpu", "cuda", "cuda:1", ...
        progress: told of everything that happens; None shows it on standard error, as the command does.
        options: the rest of `pifa_vllm.compression.options.CompressOptions`, such as tile or ridge.

    Returns:
        What `output` holds as compression_report.json: ranks, densities, errors by module, bytes, seconds.

    Raises:
        PifaError: if an option, the model, the calibration data or the output directory rules the run out; the
            message says what was expected and what was found. `UnsupportedModelError`, `CheckpointError` and
            `CalibrationError` are among its kinds.
    """
    given = {
        "density": density,
        "method": method,
        "calibration": str(calibration),
        "samples": samples,
        "length": length,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        **options,
    }
    recipe = load_recipe(Path(density)) if isinstance(density, str | Path) else uniform(density)
    chosen = CompressOptions(model=Path(model), output=Path(output), **{**given, "density": recipe})
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    command = f"pifa_vllm.compress({str(model)!r}, {str(output)!r}, {arguments})"
    return Compression(chosen, progress or make_progress(chosen.output)).run(command)
