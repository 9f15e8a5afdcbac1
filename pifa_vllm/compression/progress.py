"""What a compression run shows while it works: bars in a terminal, plain lines in a log."""

from __future__ import annotations

import atexit
import time
from pathlib import Path
from typing import Protocol

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from pifa_vllm.compression.decoder import MODULES
from pifa_vllm.compression.report.figures import KindSummary, by_kind, duration, size, summarize
from pifa_vllm.compression.report.schema import CompressionReport, LayerReport, ModuleReport


class Progress(Protocol):
    """Is told of everything that happens in a run."""

    def sampling(self, done: int, total: int) -> None:
        """Tell of `done` of `total` tokens of the model's own calibration text."""

    def sensitivity(self, done: int, total: int) -> None:
        """Tell of `done` of `total` layers that the dense model's gradients have passed."""

    def layer_started(self, layer: int, total: int) -> None:
        """Tell that decoder layer `layer` (from 0) of `total` is next."""

    def module_done(self, module: ModuleReport) -> None:
        """Tell that a linear module of the current layer is finished."""

    def layer_done(self, layer: LayerReport) -> None:
        """Tell that the current layer is finished and saved."""

    def message(self, text: str) -> None:
        """Tell the user something in one line."""

    def summary(self, report: CompressionReport) -> None:
        """Show the finished run's figures."""


def make_progress(output: Path | None = None, console: Console | None = None) -> Progress:
    """Choose the display: bars if standard error is a terminal, else one line per layer.

    Args:
        output: where the checkpoint will be, for the summary.
        console: where to write; standard error if None.
    """
    console = console or Console(stderr=True, highlight=False)
    return TerminalProgress(console, output) if console.is_terminal else LogProgress(console, output)


class LogProgress:
    """One plain line per finished layer: for CI and container logs."""

    def __init__(self, console: Console, output: Path | None = None) -> None:
        self._console = console
        self._output = output
        self._tenth: dict[str, int] = {}
        self._total = 0
        self._first = 0
        self._started = 0.0
        self._errors: dict[str, float] = {}

    def sampling(self, done: int, total: int) -> None:
        """Print a line at every tenth."""
        self._tenths("calibration", done, total, f"sampled {done:,} of {total:,} tokens from the model")

    def sensitivity(self, done: int, total: int) -> None:
        """Print a line at every tenth."""
        self._tenths("gradients", done, total, f"{done} of {total} layers, forward and backward")

    def layer_started(self, layer: int, total: int) -> None:
        """Start the clock at the first layer of this run, which a resumed run does not begin at 0."""
        if not self._started:
            self._first, self._started = layer, time.monotonic()
        self._total = total
        self._errors = {}

    def module_done(self, module: ModuleReport) -> None:
        """Keep the module's error for the layer's line."""
        self._errors[module.kind] = module.output_error

    def layer_done(self, layer: LayerReport) -> None:
        """Print the layer's line."""
        done = layer.layer + 1
        left = (time.monotonic() - self._started) / (done - self._first) * (self._total - done)
        errors = ", ".join(
            f"{kind.removesuffix('_proj')} {error:.3f}" for kind, error in self._errors.items()
        )
        self.message(
            f"layer {done}/{self._total}: {layer.seconds:.1f} s, output errors {errors}, "
            f"flow error {layer.flow_error:.4f}, {duration(left)} left"
        )

    def message(self, text: str) -> None:
        """Print one line, never wrapped."""
        self._console.print(escape(text), soft_wrap=True)

    def _tenths(self, what: str, done: int, total: int, line: str) -> None:
        tenth = 10 * done // total
        if tenth > self._tenth.get(what, 0):
            self._tenth[what] = tenth
            self.message(f"{what}: {line}")

    def summary(self, report: CompressionReport) -> None:
        """Print the final table."""
        _print_summary(report, self._console, self._output)


class TerminalProgress:
    """Bars for the layers and for the current layer's modules, with the last errors and the remaining time."""

    def __init__(self, console: Console, output: Path | None = None) -> None:
        self._console = console
        self._output = output
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            # A layer of a large model takes minutes: the default of 30 seconds would leave no speed to go by.
            speed_estimate_period=3600.0,
        )
        self._tasks: dict[str, TaskID] = {}
        # Whatever ends the run, the terminal gets its cursor back.
        atexit.register(self._bars.stop)

    def sampling(self, done: int, total: int) -> None:
        """Move the sampling bar, and take it away when it is full."""
        self._pass("calibration tokens", done, total)

    def sensitivity(self, done: int, total: int) -> None:
        """Move the gradients' bar, and take it away when it is full."""
        self._pass("gradients through layers", done, total)

    def layer_started(self, layer: int, total: int) -> None:
        """Move the layer bar to here and empty the module bar."""
        self._move("layers", layer, total)
        self._move("modules", 0, len(MODULES))
        self._bars.reset(self._tasks["modules"], note="")

    def module_done(self, module: ModuleReport) -> None:
        """Advance the module bar, noting what became of the module."""
        form = "dense" if module.dense else f"rank {module.rank}"
        note = f"{module.kind} {form}, output error {module.output_error:.3f}"
        self._bars.update(self._tasks["modules"], advance=1, note=note)

    def layer_done(self, layer: LayerReport) -> None:
        """Advance the layer bar, noting how far the flows have drifted apart."""
        self._bars.update(
            self._tasks["layers"], completed=layer.layer + 1, note=f"flow error {layer.flow_error:.4f}"
        )

    def message(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(escape(text))

    def summary(self, report: CompressionReport) -> None:
        """Take the bars away and print the final table."""
        self._bars.stop()
        _print_summary(report, self._console, self._output)

    def _pass(self, name: str, done: int, total: int) -> None:
        self._move(name, done, total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(name))
            # The layers start the display again; whoever only samples is left with a quiet terminal.
            self._bars.stop()

    def _move(self, name: str, done: int, total: int) -> None:
        self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, note="")
        self._bars.update(self._tasks[name], completed=done, total=total)


def _print_summary(report: CompressionReport, console: Console, output: Path | None) -> None:
    table = Table(
        title=f"{report.method} of {escape(report.model)}",
        title_justify="left",
        box=rich.box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("modules")
    for title in ("", "rank min", "mean", "max", "density", "error", "worst", "max |C|"):
        table.add_column(title, justify="right")
    for kind in by_kind(report):
        table.add_row(*_cells(kind))
    if report.modules:
        table.add_section()
        table.add_row(*_cells(summarize("all", report.modules)))
    console.print(table)
    lines = [
        f"parameters  {report.kept_parameters:,} of {report.dense_parameters:,} kept in the linear modules: "
        f"density {report.density:.4f}, asked for {report.density_target:.4f}",
        f"bytes       {size(report.kept_bytes)} of {size(report.dense_bytes)} ({report.dtype})",
    ]
    if report.model_dense_bytes and report.model_kept_bytes:
        lines.append(
            f"whole model {size(report.model_kept_bytes)} of {size(report.model_dense_bytes)}, embeddings included"
        )
    if report.layers:
        lines.append(
            f"flow error  {report.layers[-1].flow_error:.4f} after the last layer, on calibration tokens"
        )
    lines.append(
        f"cost        {duration(report.seconds)}, {duration(report.cpu_seconds)} of CPU time, "
        f"{size(report.peak_rss_bytes)} of memory at its peak"
    )
    if output is not None:
        lines.append(f"output      {output}")
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _cells(row: KindSummary) -> tuple[str, ...]:
    return (
        escape(row.kind),
        f"{row.modules}" + (f" ({row.dense} dense)" if row.dense else ""),
        str(row.rank_min),
        f"{row.rank_mean:.0f}",
        str(row.rank_max),
        f"{row.density:.3f}",
        f"{row.error_mean:.3f}",
        f"{row.error_max:.3f}",
        f"{row.max_coefficient:.2f}",
    )
