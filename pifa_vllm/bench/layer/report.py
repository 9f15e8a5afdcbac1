"""What the layer benchmark's results say: tables of ratios, who wins where, and a plot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pifa_vllm.bench.table import markdown_table
from pifa_vllm.checkpoint.atomic import replace_file

_DENSE = ("dense", "dense-vllm")
_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

_QUANTIZED_COLUMNS = (
    "layer",
    "tokens",
    "PIFA bf16, ms",
    "int8, to PIFA bf16",
    "int4, to PIFA bf16",
    "int8, to dense int8",
    "int8, to dense bf16",
    "int4, to dense bf16",
    "int8 of f32, to PIFA f32",
    "int8 of f32, to dense f32",
)

Rows = Iterable[dict[str, Any]]

_COLUMNS = (
    "layer",
    "tokens",
    "dense f32, ms",
    "PIFA f32",
    "PIFA bf16",
    "PIFA bf16, to dense bf16",
    "PIFA, to low rank of its rank",
    "PIFA, to the reference's forward",
    "our dense, to vLLM's: f32",
    "bf16",
    "PIFA f32, GB/s",
    "GFLOP/s",
)


def tables(results: dict[str, Any]) -> list[str]:
    """All tables of a run but those of blocks, as Markdown."""
    densities = sorted({row["density"] for row in results["rows"]})
    found = [ratio_table(results, density) for density in densities]
    if any(row["implementation"] == "pifa-int8" for row in results["rows"]):
        found += [quantized_table(results, density) for density in densities]
    return [*found, dispatch_table(results)]


def quantized_table(results: dict[str, Any], density: float) -> str:
    """Quantized factors, with bfloat16 and float32 activations, in times as fast as what else there is."""
    lines = []
    for (layer, tokens), rows in _cases(results["rows"], density).items():
        narrow, wide = _find(rows, "pifa", "bfloat16"), _find(rows, "pifa", "float32")
        int8, int4 = (_find(rows, f"pifa-{name}", "bfloat16") for name in ("int8", "int4"))
        int8_wide = _find(rows, "pifa-int8", "float32")
        lines.append(
            [
                layer,
                str(tokens),
                "" if narrow is None else f"{narrow['ms']:.2f}",
                _ratio(narrow, int8),
                _ratio(narrow, int4),
                _ratio(_find(rows, "dense-int8-vllm", "bfloat16"), int8),
                _ratio(_dense(rows, "bfloat16"), int8),
                _ratio(_dense(rows, "bfloat16"), int4),
                _ratio(wide, int8_wide),
                _ratio(_dense(rows, "float32"), int8_wide),
            ]
        )
    return markdown_table(_QUANTIZED_COLUMNS, lines)


def ratio_table(results: dict[str, Any], density: float) -> str:
    """Times faster, per layer and number of tokens, as Markdown.

    "PIFA f32" and "PIFA bf16" are against dense float32, the faster of torch's F.linear and vLLM's own linear;
    "to dense bf16" is against the faster of these in bfloat16. The other ratios are in float32.
    """
    return _ratios(_cases(results["rows"], density))


def block_table(results: dict[str, Any], density: float, name: str) -> str:
    """`ratio_table` of all layers together, as a decoder block runs them one after another.

    Args:
        results: of the layers of one model.
        density: kept / dense parameters.
        name: of the block, for the table.
    """
    blocks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (_, tokens), rows in _cases(results["rows"], density).items():
        total = blocks.setdefault((name, tokens), [])
        for row in rows:
            same = _find(total, row["implementation"], row["dtype"])
            if same is None:
                total.append(dict(row))
                continue
            same["ms"] += row["ms"]
            same["parameters"] += row["parameters"]
            same["gbytes_per_s"] = (
                same["parameters"] * (4 if row["dtype"] == "float32" else 2) / same["ms"] / 1e6
            )
            same["gflops"] = 2 * same["parameters"] * tokens / same["ms"] / 1e6
    return _ratios(blocks)


def _ratios(cases: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    lines = []
    for (layer, tokens), rows in cases.items():
        dense = _dense(rows, "float32")
        pifa, pifa16 = _find(rows, "pifa", "float32"), _find(rows, "pifa", "bfloat16")
        cells = [
            layer,
            str(tokens),
            "" if dense is None else f"{dense['ms']:.2f}",
            _ratio(dense, pifa),
            _ratio(dense, pifa16),
            _ratio(_dense(rows, "bfloat16"), pifa16),
            _ratio(_find(rows, "lowrank-rank", "float32"), pifa),
            _ratio(_find(rows, "reference", "float32"), pifa),
            *(
                _ratio(_find(rows, "dense-vllm", dtype), _find(rows, "dense-ours", dtype))
                for dtype in ("float32", "bfloat16")
            ),
            "" if pifa is None else f"{pifa['gbytes_per_s']:.1f}",
            "" if pifa is None else f"{pifa['gflops']:.0f}",
        ]
        lines.append(cells)
    return markdown_table(_COLUMNS, lines)


def dispatch_table(results: dict[str, Any]) -> str:
    """The fastest implementation of each case, as Markdown: what a dispatcher should choose on this machine."""
    densities = sorted({row["density"] for row in results["rows"]})
    dtypes = sorted({row["dtype"] for row in results["rows"]})
    head = [f"{_NAMES[dtype]}, density {density:g}" for density in densities for dtype in dtypes]
    lines = []
    cases = {(row["layer"], row["tokens"]): None for row in results["rows"]}
    for layer, tokens in cases:
        cells = [layer, str(tokens)]
        for density in densities:
            for dtype in dtypes:
                rows = [r for r in _cases(results["rows"], density)[layer, tokens] if r["dtype"] == dtype]
                # Low rank is no choice: it has more parameters at this rank, or a lower rank at this density. Nor
                # are fewer bits.
                rows = [r for r in rows if not re.search("lowrank|int", r["implementation"])]
                cells.append(min(rows, key=lambda r: r["ms"])["implementation"])
        lines.append(cells)
    return markdown_table(["layer", "tokens", *head], lines)


def plot(results: dict[str, Any], output: Path) -> None:
    """Draw time relative to dense float32 over the number of tokens, one panel per layer, as SVG."""
    from matplotlib.figure import Figure

    density = min(row["density"] for row in results["rows"])
    cases = _cases(results["rows"], density)
    layers = list(dict.fromkeys(layer for layer, _ in cases))
    columns = min(3, len(layers))
    rows_of_panels = -(-len(layers) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows_of_panels), layout="tight")
    axes = figure.subplots(rows_of_panels, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        tokens = [t for name, t in cases if name == layer]
        for implementation, dtype in (
            ("pifa", "float32"),
            ("pifa", "bfloat16"),
            ("lowrank-density", "float32"),
            ("reference", "float32"),
            ("dense-ours", "float32"),
        ):
            speedups = []
            for t in tokens:
                row = _find(cases[layer, t], implementation, dtype)
                dense = _dense(cases[layer, t], "float32")
                speedups.append(dense["ms"] / row["ms"] if row and dense else float("nan"))
            axis.plot(tokens, speedups, marker="o", label=f"{implementation} {_NAMES[dtype]}")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=layer, xlabel="tokens")
        axis.set_xticks(tokens, [str(t) for t in tokens])
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
    axes[0, 0].set_ylabel(f"times faster than dense f32 (density {density:g})")
    axes[0, 0].legend(fontsize="small")
    replace_file(output, lambda path: figure.savefig(path, format="svg"))


def _cases(rows: Rows, density: float) -> dict[tuple[str, int], list[dict[str, Any]]]:
    cases: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["density"] == density:
            cases.setdefault((row["layer"], row["tokens"]), []).append(row)
    return cases


def _find(rows: Rows, implementation: str, dtype: str) -> dict[str, Any] | None:
    return next((r for r in rows if (r["implementation"], r["dtype"]) == (implementation, dtype)), None)


def _dense(rows: Rows, dtype: str) -> dict[str, Any] | None:
    """The faster of torch's and vLLM's dense linear."""
    found = [r for r in rows if r["implementation"] in _DENSE and r["dtype"] == dtype]
    return min(found, key=lambda r: r["ms"], default=None)


def _ratio(slower: dict[str, Any] | None, faster: dict[str, Any] | None) -> str:
    return "" if slower is None or faster is None else f"{slower['ms'] / faster['ms']:.2f}x"
