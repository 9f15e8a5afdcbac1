"""What the results of `bench quality` say: losses against the dense model, pairs, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pifa_vllm.bench.quality.plan import DENSE
from pifa_vllm.bench.table import markdown_table
from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.evaluate.protocol import standard_error

_COLUMNS = (
    *("variant", "density", "perplexity", "nats lost", "KL to dense", "same first choice"),
    *("MFLOPs a token", "MB", "seeds: spread of nats lost"),
)


@dataclass(frozen=True)
class Measured:
    """One variant at one density on one text.

    Attributes:
        rows: the results' rows, one per seed, by seed.
        dense: the dense model's row.
    """

    variant: str
    density: float | None
    rows: dict[int | None, dict[str, Any]]
    dense: dict[str, Any]

    def nll(self, seeds: Sequence[int | None] | None = None) -> list[float]:
        """NLL of each window, the mean over the seeds."""
        taken = [self.rows[seed]["windows"]["nll"] for seed in seeds or self.rows]
        return [math.fsum(values) / len(values) for values in zip(*taken, strict=True)]

    @property
    def lost(self) -> list[float]:
        """How much higher each window's NLL is than the dense model's, in nats."""
        return [x - y for x, y in zip(self.nll(), self.dense["windows"]["nll"], strict=True)]

    def mean(self, figure: str) -> float:
        """The mean of a figure over windows and seeds."""
        return _mean([x for row in self.rows.values() for x in row["windows"][figure]])


def measured(results: dict[str, Any], text: str) -> list[Measured]:
    """Group the rows of one text, the dense model first, then by density from high to low."""
    rows = [row for row in results["rows"] if row["text"] == text]
    dense = next(row for row in rows if row["variant"] == DENSE)
    groups: dict[tuple[str, float | None], dict[int | None, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["density"]), {})[row["seed"]] = row
    found = [Measured(variant, density, group, dense) for (variant, density), group in groups.items()]
    return sorted(found, key=lambda x: (x.variant != DENSE, -(x.density or 1.0)))


def loss_table(results: dict[str, Any], text: str) -> str:
    """Every variant against the dense model."""
    return markdown_table(_COLUMNS, [_line(x) for x in measured(results, text)])


def pair_table(results: dict[str, Any], text: str) -> str | None:
    """Every variant against the plan's `against` at the same density and seeds; None where nothing compares.

    What is a directory in the plan has no seed: it was made from the checkpoint of the first one.
    """
    against, groups = results["against"], measured(results, text)
    lines = []
    for base in groups:
        for other in groups:
            if base.variant != against or other.variant == against or other.density != base.density:
                continue
            seeds = [seed for seed in base.rows if seed in other.rows]
            own: list[int | None] = list(seeds)
            if None in other.rows and not seeds:
                own, seeds = [None], [min(base.rows, key=lambda seed: seed or 0)]
            if seeds:
                pairs = zip(other.nll(own), base.nll(seeds), strict=True)
                difference = _with_error([x - y for x, y in pairs], sign="+")
                lines.append([other.variant, f"{base.density:g}", difference, ", ".join(map(str, seeds))])
    columns = ("variant", "density", f"nats more than {against}", "seeds")
    return markdown_table(columns, lines) if lines else None


def tables(results: dict[str, Any]) -> Iterator[str]:
    """All tables, text by text."""
    for text, about in results["texts"].items():
        windows = len(measured(results, text)[0].dense["windows"]["nll"])
        yield f"{text} ({about['file']}), {windows} windows of {results['seqlen']} tokens"
        yield loss_table(results, text)
        if (pairs := pair_table(results, text)) is not None:
            yield pairs


def plot(results: dict[str, Any], output: Path) -> None:
    """Draw nats lost over FLOPs and over bytes, both as shares of the dense model's; a row per text, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    texts = list(results["texts"])
    figure = Figure(figsize=(9.5, 3.8 * len(texts)), layout="tight")
    axes = figure.subplots(len(texts), 2, sharey=True, squeeze=False)
    for text, panels in zip(texts, axes, strict=True):
        groups = [x for x in measured(results, text) if x.variant != DENSE]
        for axis, cost, title in zip(panels, ("flops_per_token", "bytes"), ("FLOPs", "bytes"), strict=True):
            for variant in dict.fromkeys(x.variant for x in groups):
                points = [x for x in groups if x.variant == variant]
                axis.errorbar(
                    [x.rows[min(x.rows, key=str)][cost] / x.dense[cost] for x in points],
                    [_mean(x.lost) for x in points],
                    yerr=[standard_error(x.lost) or 0.0 for x in points],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=variant,
                )
            # Straight below 0.01, logarithms above: rounding to 8 bits loses next to nothing.
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set(xlabel=f"{title} a token, share of dense (16 bits)", title=f"{text}: loss over {title}")
            axis.axhline(0.0, color="grey", linewidth=0.8)
        panels[0].set_ylabel("nats lost")
        panels[1].legend(fontsize="small")
    # Without date and random ids, the same results give the same file.
    with rc_context({"svg.hashsalt": "quality"}):
        replace_file(output, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


def _line(found: Measured) -> list[str]:
    row = next(iter(found.rows.values()))
    costs = [f"{row['flops_per_token'] / 1e6:.1f}", f"{row['bytes'] / 1e6:.1f}"]
    figures = [found.variant, "" if found.density is None else f"{found.density:g}"]
    perplexity = math.exp(min(_mean(found.nll()), 700.0))
    figures.append(f"{perplexity:.2f}" if perplexity < 10_000 else f"{perplexity:.0e}")
    if found.variant == DENSE:
        return [*figures, "", "", "", *costs, ""]
    spread = ""
    if len(found.rows) > 1:
        dense = _mean(found.dense["windows"]["nll"])
        each = [_mean(row["windows"]["nll"]) - dense for row in found.rows.values()]
        spread = f"{len(each)}: {min(each):.4f} to {max(each):.4f}"
    return [
        *figures,
        _with_error(found.lost),
        f"{found.mean('kl'):.4f}",
        f"{100 * found.mean('top1'):.1f} %",
        *costs,
        spread,
    ]


def _with_error(values: Sequence[float], sign: str = "") -> str:
    error = standard_error(values)
    return f"{_mean(values):{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
