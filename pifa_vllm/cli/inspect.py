"""`pifa-vllm inspect`: what a checkpoint consists of."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pifa_vllm.checkpoint import Checkpoint
    from pifa_vllm.checkpoint.summary import ModuleSummary


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "inspect",
        description="Show a PIFA checkpoint's modules, ranks, densities, bytes, largest coefficients and "
        "provenance. Densities count the linear modules of the decoder layers; bytes are those of the tensors.",
    )
    parser.add_argument("model", type=Path, help="PIFA checkpoint")
    parser.add_argument("--modules", action="store_true", help="a line per module, not per kind of module")
    parser.add_argument("--json", action="store_true", help="print JSON, with every module")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print tables, or JSON."""
    from pifa_vllm.checkpoint import Checkpoint
    from pifa_vllm.checkpoint.summary import summarize

    checkpoint = Checkpoint.open(args.model)
    modules = summarize(checkpoint)
    totals = _totals(checkpoint, modules)
    if args.json:
        value = {
            "directory": str(args.model),
            "config": checkpoint.config.model_dump(exclude={"ranks", "provenance"}),
            "totals": totals,
            "modules": [module.to_dict() for module in modules],
            "provenance": checkpoint.config.provenance,
        }
        print(json.dumps(value, indent=2))
        return 0

    from rich.console import Console

    # Where there is no terminal to fit, rows stay whole.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(_module_table(modules) if args.modules else _kind_table(modules))
    for line in _lines(checkpoint, totals):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def _totals(checkpoint: Checkpoint, modules: Sequence[ModuleSummary]) -> dict[str, Any]:
    kept = sum(module.parameters for module in modules)
    dense = sum(module.dense_parameters for module in modules)
    saved = sum(module.dense_nbytes - module.nbytes for module in modules)
    nbytes = sum(entry.nbytes for entry in checkpoint.shards.entries.values())
    return {
        "compressed_modules": len(checkpoint.modules),
        "dense_modules": len(modules) - len(checkpoint.modules),
        "parameters": kept,
        "dense_parameters": dense,
        "density": kept / dense if dense else 1.0,
        "nbytes": nbytes,
        "dense_nbytes": nbytes + saved,
        "max_coefficient": max((module.max_coefficient for module in modules), default=0.0),
    }


def _kind_table(modules: Sequence[ModuleSummary]) -> Table:
    """One row per kind of module and shape, compressed and dense ones apart."""
    groups: dict[tuple[str, int, int, bool], list[ModuleSummary]] = {}
    for module in modules:
        key = (module.kind, module.out_features, module.in_features, module.rank is None)
        groups.setdefault(key, []).append(module)
    ranks_head = ("rank min", "mean", "max")
    table = _table("module", "count", "out x in", *ranks_head, "density", "MiB", "dense MiB", "max|C|")
    for (kind, m, n, dense), group in groups.items():
        ranks = [module.rank for module in group if module.rank is not None]
        mean = sum(ranks) / max(len(ranks), 1)
        table.add_row(
            kind,
            str(len(group)),
            f"{m} x {n}",
            *(("dense", "", "") if dense else (str(min(ranks)), f"{mean:.1f}", str(max(ranks)))),
            f"{sum(module.parameters for module in group) / (m * n * len(group)):.4f}",
            _mebibytes(sum(module.nbytes for module in group)),
            _mebibytes(sum(module.dense_nbytes for module in group)),
            "" if dense else f"{max(module.max_coefficient for module in group):.2f}",
        )
    return table


def _module_table(modules: Sequence[ModuleSummary]) -> Table:
    table = _table("module", "out x in", "rank", "density", "MiB", "dense MiB", "max|C|")
    for module in modules:
        table.add_row(
            module.name,
            f"{module.out_features} x {module.in_features}",
            "dense" if module.rank is None else str(module.rank),
            f"{module.density:.4f}",
            _mebibytes(module.nbytes),
            _mebibytes(module.dense_nbytes),
            "" if module.rank is None else f"{module.max_coefficient:.2f}",
        )
    return table


def _table(name: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _lines(checkpoint: Checkpoint, totals: dict[str, Any]) -> list[str]:
    """What stands below the table: totals, then the provenance, one line per entry."""
    from pifa_vllm.checkpoint.files import printable

    config = checkpoint.config
    lines = [
        f"density       {totals['density']:.4f}: {totals['parameters']:,} of {totals['dense_parameters']:,} "
        f"parameters in {totals['compressed_modules']} compressed and {totals['dense_modules']} dense modules "
        f"(config.json says {config.density:.4f})",
        f"model         {_mebibytes(totals['nbytes'])} MiB, dense {_mebibytes(totals['dense_nbytes'])} MiB",
        f"max|C|        {totals['max_coefficient']:.3f}",
        f"format        {config.quant_method}, version {config.format_version}",
    ]
    for key, value in config.provenance.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        lines.append(printable(f"{key:13} {shown}"))
    return lines


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f}"
