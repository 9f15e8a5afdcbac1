"""The end of a run: report, pages and config beside the finished shards, published in one rename."""

from __future__ import annotations

import importlib.metadata
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import pifa_vllm
from pifa_vllm.checkpoint import CheckpointWriter, PIFAConfig
from pifa_vllm.checkpoint.schema import (
    COEFFICIENT_SCALE,
    COEFFICIENTS,
    PIVOT_SCALE,
    PIVOT_WEIGHT,
    WEIGHT_SCALE,
)
from pifa_vllm.compression.allocation import RECIPE_NAME, Recipe, dump_recipe, kept_parameters
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.journal import Journal
from pifa_vllm.compression.options import CompressOptions
from pifa_vllm.compression.report.render import render_files
from pifa_vllm.compression.report.schema import CARD_NAME, CompressionReport
from pifa_vllm.errors import CheckpointError

_VERSIONED = ("torch", "transformers", "safetensors", "numpy")


def publish(
    writer: CheckpointWriter,
    model: DenseModel,
    options: CompressOptions,
    dtype: torch.dtype,
    journal: Journal,
    calibration: dict[str, Any],
    command: str,
    recipe: Recipe,
    source: dict[str, Any],
) -> CompressionReport:
    """Complete a checkpoint whose decoder layers are written, and make it appear as the output directory.

    Everything is written anew, so that a run which was killed in the middle of this only does it again.

    Args:
        writer: holds the shards of every decoder layer.
        model: the dense model.
        options: of the run.
        dtype: storage dtype.
        journal: of the run, all layers finished.
        calibration: record of the calibration tokens.
        command: the command line, for the record.
        recipe: of the ranks that the modules were given.
        source: provenance of the checkpoint whose factors were quantized; empty for a dense model.

    Raises:
        CheckpointError: if a file cannot be written, the output directory exists by now, or nothing is left of the
            model.
    """
    for index, name in enumerate(model.untouched_tensors()):
        writer.write_shard(f"top-{index:05d}.safetensors", {name: model.load_as(name, dtype)})
    # Not the allocated ranks: a module's weight may have turned out to have less.
    ranks = {x.name: x.rank for x in journal.modules if not x.dense}
    if not any(x.dense or x.rank for x in journal.modules):
        raise CheckpointError(
            f"{options.model}: expected a trained model, found linear modules that are all zero, or get nothing "
            "but zeros of the calibration text."
        )
    report = _report(writer, model, options, dtype, journal, ranks, calibration, command)
    writer.copy_companions(options.model)
    writer.write_text(RECIPE_NAME, dump_recipe(recipe))
    for file, text in render_files(report, _source_card(options.model)).items():
        writer.write_text(file, text)
    config = {**model.raw_config, "dtype": report.dtype}
    config.pop("torch_dtype", None)
    section = None
    if options.representation == "pifa":
        provenance = {
            "method": options.method,
            "model": options.model.name,
            "calibration": calibration,
            "options": options.record(),
            "fingerprint": journal.fingerprint,
            "pifa_vllm": pifa_vllm.__version__,
            **({"source": source} if source else {}),
        }
        section = PIFAConfig(
            format_version=1 if options.factors is None else 2,
            density=report.density,
            ranks=ranks,
            factors=options.factors,
            provenance=provenance,
        )
    writer.publish(config, section)
    return report


def _source_card(directory: Path) -> str | None:
    try:
        return (directory / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Not there, as a rule. One that cannot be read costs the new card its licence line, not the whole run.
        return None


def _report(
    writer: CheckpointWriter,
    model: DenseModel,
    options: CompressOptions,
    dtype: torch.dtype,
    journal: Journal,
    ranks: dict[str, int],
    calibration: dict[str, Any],
    command: str,
) -> CompressionReport:
    linears = model.linears()
    kept = kept_parameters(linears, ranks, options.representation)
    dense = sum(x.m * x.n for x in linears)
    suffixes = (PIVOT_WEIGHT, PIVOT_SCALE, COEFFICIENTS, COEFFICIENT_SCALE, "weight", WEIGHT_SCALE)
    numbers = {f"{x.name}.{suffix}" for x in linears for suffix in suffixes}
    versions = {"pifa-vllm": pifa_vllm.__version__, "python": sys.version.split()[0]}
    versions |= {package: importlib.metadata.version(package) for package in _VERSIONED}
    return CompressionReport(
        model=str(options.model),
        architecture=model.raw_config["architectures"][0],
        method=options.method,
        representation=options.representation,
        density_target=sum(options.density(x) * x.m * x.n for x in linears) / dense,
        density=kept / dense,
        dense_parameters=dense,
        kept_parameters=kept,
        dense_bytes=dense * dtype.itemsize,
        kept_bytes=kept * dtype.itemsize
        if options.factors is None
        else writer.tensor_bytes(numbers.__contains__),
        model_dense_bytes=sum(entry.nbytes for entry in model.shards.entries.values()),
        model_kept_bytes=writer.tensor_bytes(),
        dtype=str(dtype).removeprefix("torch."),
        calibration=calibration,
        options=options.record(),
        fingerprint=journal.fingerprint,
        seconds=journal.seconds,
        cpu_seconds=journal.cpu_seconds,
        peak_rss_bytes=journal.peak_rss_bytes,
        versions=versions,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        modules=journal.modules,
        layers=journal.layers,
    )
