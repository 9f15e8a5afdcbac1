"""What the end-to-end benchmark's results say: tables of speed and memory, and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from pifa_vllm.bench.served.load import Workload
from pifa_vllm.bench.table import markdown_table
from pifa_vllm.checkpoint.atomic import replace_file

_SPEED_COLUMNS = (
    "requests",
    "server",
    "prompt tokens/s",
    "generated tokens/s",
    "TTFT, ms: median",
    "p99",
    "TPOT, ms: median",
    "p99",
    "times the first server's rate (rounds)",
)
_MEMORY_COLUMNS = (
    "server",
    "weights, MB",
    "of the linear modules",
    "of these, to dense",
    "KV-cache tokens in the same memory",
    "peak RSS, MB",
    "ready after, s",
    "weights loaded in, s",
)


def rate(workload: Workload, row: dict[str, Any]) -> float:
    """Tokens per second of one round: prompt tokens if only they cost anything, else generated ones.

    Prompt tokens are counted over the whole round, generated ones over the time after each first token, during
    which as many requests as are in flight at once get a token each.
    """
    if workload.output_len == 1:
        return float(row["input_tokens"] / row["duration"])
    return float(workload.concurrency / statistics.median(row["tpot"]))


def ratios(cell: dict[str, Any], server: str) -> tuple[float, float, float]:
    """Compare a server's rate with that of the first server of its cell.

    Returns:
        The ratio of the medians over the rounds, the smallest and the largest ratio of a round.
    """
    workload = Workload(**cell["workload"])
    rates = {
        name: [rate(workload, row) for row in cell["rounds"] if row["server"] == name]
        for name in (cell["servers"][0], server)
    }
    first, this = rates[cell["servers"][0]], rates[server]
    by_round = [b / a for a, b in zip(first, this, strict=True)]
    return statistics.median(this) / statistics.median(first), min(by_round), max(by_round)


def speed_table(results: dict[str, Any]) -> str:
    """Speed of every server under every workload, as Markdown; medians over the rounds."""
    lines = []
    for cell in results["cells"]:
        workload = Workload(**cell["workload"])
        for name in cell["servers"]:
            rows = [row for row in cell["rounds"] if row["server"] == name]
            speed = f"{statistics.median(rate(workload, row) for row in rows):.1f}"
            prefill = workload.output_len == 1
            ratio, low, high = ratios(cell, name)
            cells = [
                workload.name,
                name,
                speed if prefill else "",
                "" if prefill else speed,
                *_milliseconds([value for row in rows for value in row["ttft"]]),
                *_milliseconds([value for row in rows for value in row["tpot"]]),
                "1" if name == cell["servers"][0] else f"{ratio:.2f}x ({low:.2f} to {high:.2f})",
            ]
            lines.append(cells)
    return markdown_table(_SPEED_COLUMNS, lines)


def memory_table(results: dict[str, Any]) -> str:
    """Weights, KV cache, peak memory and start of every server, as Markdown.

    "In the same memory" is that of the largest server's weights and KV cache: what a server has smaller weights
    by, its KV cache may be larger by.
    """
    servers = results["servers"]
    memory = max(x["weights"]["total"] + x["memory"]["kv_cache_bytes"] for x in servers.values())
    lines = []
    for name, x in servers.items():
        weights, found = x["weights"], x["memory"]
        per_token = found["kv_cache_bytes"] / found["kv_cache_tokens"]
        loads = [start["weights_seconds"] for start in x["starts"] if start["weights_seconds"] is not None]
        cells = [
            name,
            f"{weights['total'] / 1e6:.0f}",
            f"{weights['linear'] / 1e6:.0f}",
            f"{weights['linear'] / weights['dense_linear']:.4f}",
            f"{(memory - weights['total']) / per_token:.0f}",
            f"{found['peak_rss_bytes'] / 1e6:.0f}",
            f"{statistics.median(start['seconds'] for start in x['starts']):.1f}" if x["starts"] else "",
            f"{statistics.median(loads):.2f}" if loads else "",
        ]
        lines.append(cells)
    return markdown_table(_MEMORY_COLUMNS, lines)


def plot(results: dict[str, Any], output: Path) -> None:
    """Draw every server's rate against the first server's, per workload, with the spread over rounds, as SVG."""
    from matplotlib.figure import Figure

    bars = [
        (f"{Workload(**cell['workload']).name}\n{name} to {cell['servers'][0]}", *ratios(cell, name))
        for cell in results["cells"]
        for name in cell["servers"][1:]
    ]
    labels, middles, lows, highs = zip(*reversed(bars), strict=True)
    figure = Figure(figsize=(8.0, 1.0 + 0.5 * len(bars)), layout="tight")
    axis = figure.subplots()
    below = [max(0.0, m - low) for m, low in zip(middles, lows, strict=True)]
    above = [max(0.0, high - m) for m, high in zip(middles, highs, strict=True)]
    axis.barh(labels, middles, xerr=[below, above], color="tab:blue", ecolor="black", capsize=2)
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.set_xlabel("times the rate (prompt tokens/s where one token is generated, else generated tokens/s)")
    axis.tick_params(labelsize="small")
    replace_file(output, lambda path: figure.savefig(path, format="svg"))


def _milliseconds(seconds: list[float]) -> tuple[str, str]:
    if not seconds:
        return "", ""
    return f"{statistics.median(seconds) * 1e3:.0f}", f"{np.percentile(seconds, 99) * 1e3:.0f}"
