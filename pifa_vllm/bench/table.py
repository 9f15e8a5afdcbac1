"""Markdown tables from committed results, so that no figure in the README is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TITLES = {
    "svd": "SVD",
    "svd-llm": "SVD-LLM",
    "svd-llm-pifa": "SVD-LLM + PIFA",
    "mpifa": "`mpifa`",
    "mpifa-exact-no-feedback": "`mpifa-exact --feedback 0`",
    "mpifa-exact": "`mpifa-exact`",
}


def table_head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def perplexity_table(results: dict[str, Any]) -> str:
    """Perplexities, one row per density and one column per variant, from `bench quality`'s JSON."""
    rows = results["rows"]
    dense = next(row["perplexity"] for row in rows if row["variant"] == "dense")
    found = {(row["density"], row["variant"]): row["perplexity"] for row in rows}
    variants = [name for name in _TITLES if any(row["variant"] == name for row in rows)]
    densities = sorted({row["density"] for row in rows if row["variant"] != "dense"}, reverse=True)
    lines = table_head(["density", "dense", *(_TITLES[name] for name in variants)])
    for density in densities:
        cells = [_figure(found.get((density, name))) for name in variants]
        lines.append(f"| {density:g} | {dense:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(results: dict[str, Any]) -> str:
    """Cost and exactness of each run, from `bench quality`'s JSON."""
    lines = [
        "| variant | density asked / kept | CPU s | wall s | peak memory | max weight error | max abs(C) |",
        "|---" * 7 + "|",
    ]
    for row in results["rows"]:
        if not row["variant"].startswith("mpifa"):
            continue
        lines.append(
            f"| {_TITLES[row['variant']]} | {row['density']:g} / {row['kept_density']:.4f} "
            f"| {row['cpu_seconds']:.0f} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 1e9:.2f} GB "
            f"| {row['max_weight_error']:.1e} | {row['max_coefficient']:.2f} |"
        )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 10_000 else f"{value:.0e}"
