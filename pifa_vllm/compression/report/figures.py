"""The figures that terminal, HTML report and model card all show of a run, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass

from pifa_vllm.compression.report.schema import CompressionReport, HealingReport, ModuleReport


@dataclass(frozen=True)
class KindSummary:
    """All modules of one kind ("q_proj"), over the layers.

    Attributes:
        kind: last part of the modules' names; "all" for the whole model.
        modules: how many there are.
        dense: how many of them stay dense.
        rank_min, rank_mean, rank_max: over the modules.
        rank_full: min(m, n); 0 where it differs between modules.
        density: kept / dense parameters.
        error_mean: root mean square of the relative output errors.
        error_max: the largest of them.
        worst: name of the module that has it.
        weight_error: the largest error of the stored form.
        max_coefficient: the largest |C|.
    """

    kind: str
    modules: int
    dense: int
    rank_min: int
    rank_mean: float
    rank_max: int
    rank_full: int
    density: float
    error_mean: float
    error_max: float
    worst: str
    weight_error: float
    max_coefficient: float


def summarize(kind: str, modules: list[ModuleReport]) -> KindSummary:
    """Summarise these modules, of which there must be one at least, under a common name."""
    numbers = sum(x.m * x.n for x in modules)
    full = {min(x.m, x.n) for x in modules}
    worst = max(modules, key=lambda x: x.output_error)
    return KindSummary(
        kind=kind,
        modules=len(modules),
        dense=sum(x.dense for x in modules),
        rank_min=min(x.rank for x in modules),
        rank_mean=sum(x.rank for x in modules) / len(modules),
        rank_max=max(x.rank for x in modules),
        rank_full=full.pop() if len(full) == 1 else 0,
        density=sum(x.density * x.m * x.n for x in modules) / numbers,
        error_mean=(sum(x.output_error**2 for x in modules) / len(modules)) ** 0.5,
        error_max=worst.output_error,
        worst=worst.name,
        weight_error=max(x.weight_error for x in modules),
        max_coefficient=max(x.max_coefficient for x in modules),
    )


def by_kind(report: CompressionReport) -> list[KindSummary]:
    """Summarise a run's modules by kind, in the order in which the kinds occur in a layer."""
    kinds = dict.fromkeys(x.kind for x in report.modules)
    return [summarize(kind, [x for x in report.modules if x.kind == kind]) for kind in kinds]


def size(count: float) -> str:
    """Write a number of bytes in decimal units, as disks and model hubs do: "94.4 MB"."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        # Not 1000: what would round up to it is written in the larger unit.
        if count < 999.5:
            break
        count, unit = count / 1000, larger
    decimals = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{decimals}f} {unit}"


def duration(seconds: float) -> str:
    """Write a time span: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe_calibration(report: CompressionReport) -> str:
    """Say in one sentence what a run was calibrated on."""
    record = report.calibration
    if not record or report.method == "svd":
        return "No calibration data."
    name = record.get("name", "")
    sources = {
        "self": "sampled from the dense model itself at temperature 1",
        "text": f"from the text file {name}",
        "jsonl": f"from the JSONL file {name}",
        "dataset": f"from the dataset {name}, {record.get('config') or 'default'} config, "
        f"{record.get('split')} split",
    }
    what = sources.get(str(record.get("source")), "of unknown origin")
    if "tokens_file" in record:
        what += f" (token file {record['tokens_file']})"
    return (
        f"{record.get('samples', '?')} sequences of {record.get('length', '?')} tokens {what}, "
        f"seed {record.get('seed', '?')}."
    )


def describe_healing(healing: HealingReport) -> str:
    """Say in a few sentences what a healing run did, and at which cost."""
    passes = healing.tokens_seen / max(1, healing.tokens_available)
    trained = "factors, norms and embeddings" if healing.options.get("embeddings") else "factors and norms"
    name = healing.calibration.get("name")
    source = "the dense model's own samples" if name is None else str(name)
    early = f" Ended early: {healing.stopped}." if healing.stopped else ""
    return (
        f"Distilled from the dense model's logits: {trained}, {healing.tokens_seen:,} tokens seen "
        f"({passes:.1f} passes over {source}). KL divergence from the dense model on {healing.held_out_tokens:,} "
        f"held-out tokens: {healing.held_out_before:.4f} before, {healing.held_out_after:.4f} after, in nats per "
        f"token.{early} {duration(healing.seconds)}, {duration(healing.cpu_seconds)} of CPU time, "
        f"{size(healing.peak_rss_bytes)} of memory."
    )
