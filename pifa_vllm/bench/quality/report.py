"""What the results of `bench quality` say, as tables."""

from __future__ import annotations

from typing import Any

from pifa_vllm.bench.table import markdown_table

_TITLES = {
    "svd": "SVD",
    "svd-llm": "SVD-LLM",
    "svd-llm-pifa": "SVD-LLM + PIFA",
    "mpifa": "`mpifa`",
    "mpifa-exact-no-feedback": "`mpifa-exact --feedback 0`",
    "mpifa-exact": "`mpifa-exact`",
}
_COST_COLUMNS = (
    "variant",
    "density asked / kept",
    "CPU s",
    "wall s",
    "peak memory",
    "max weight error",
    "max abs(C)",
)


def perplexity_table(results: dict[str, Any]) -> str:
    """Perplexities, one row per density and one column per variant."""
    rows = results["rows"]
    dense = next(row["perplexity"] for row in rows if row["variant"] == "dense")
    found = {(row["density"], row["variant"]): row["perplexity"] for row in rows}
    variants = [name for name in _TITLES if any(row["variant"] == name for row in rows)]
    densities = sorted({row["density"] for row in rows if row["variant"] != "dense"}, reverse=True)
    return markdown_table(
        ["density", "dense", *(_TITLES[name] for name in variants)],
        [
            [f"{density:g}", f"{dense:.2f}", *(_figure(found.get((density, name))) for name in variants)]
            for density in densities
        ],
    )


def cost_table(results: dict[str, Any]) -> str:
    """Cost and exactness of each run."""
    return markdown_table(
        _COST_COLUMNS,
        [
            [
                _TITLES[row["variant"]],
                f"{row['density']:g} / {row['kept_density']:.4f}",
                f"{row['cpu_seconds']:.0f}",
                f"{row['seconds']:.0f}",
                f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
                f"{row['max_weight_error']:.1e}",
                f"{row['max_coefficient']:.2f}",
            ]
            for row in results["rows"]
            if row["variant"].startswith("mpifa")
        ],
    )


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 10_000 else f"{value:.0e}"
