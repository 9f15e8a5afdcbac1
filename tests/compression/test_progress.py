from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from pifa_vllm.compression.progress import LogProgress, Progress, TerminalProgress, make_progress
from pifa_vllm.compression.report.schema import CompressionReport, LayerReport
from tests.compression.report.sample_report import module, sample_report


def consoles() -> tuple[Console, Console]:
    log = Console(file=io.StringIO(), force_terminal=False, width=80)
    return log, Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def play(progress: Progress, report: CompressionReport, first: int = 0) -> None:
    for layer in report.layers[first:]:
        progress.layer_started(layer.layer, len(report.layers))
        for x in report.modules:
            if x.layer == layer.layer:
                progress.module_done(x)
        progress.layer_done(layer)
    progress.summary(report)


def test_the_console_decides_on_the_display() -> None:
    log, terminal = consoles()
    assert isinstance(make_progress(console=log), LogProgress)
    assert isinstance(make_progress(console=terminal), TerminalProgress)


def test_a_log_has_one_line_per_layer() -> None:
    console, _ = consoles()
    play(LogProgress(console), sample_report(depth=3), first=1)
    lines = [line for line in text_of(console).splitlines() if line.startswith("layer ")]
    assert [line.split(":")[0] for line in lines] == ["layer 2/3", "layer 3/3"]
    assert "output errors q 0.110, k 0.110, o 0.110, gate 0.110, down 0.110, flow error 0.1000" in lines[0]
    assert lines[1].endswith("0.0 s left")
    assert "\x1b" not in text_of(console)


def test_a_log_tells_of_sampling_ten_times() -> None:
    console, _ = consoles()
    progress = LogProgress(console)
    for done in range(0, 1001, 8):
        progress.sampling(done, 1000)
    assert len(text_of(console).splitlines()) == 10


def test_a_log_tells_of_gradients_ten_times_after_as_much_sampling() -> None:
    console, _ = consoles()
    progress = LogProgress(console)
    for done in range(61):
        progress.sampling(done, 60)
    for done in range(61):
        progress.sensitivity(done, 60)
    lines = text_of(console).splitlines()
    assert sum(line.startswith("gradients: ") for line in lines) == 10
    assert lines[-1] == "gradients: 60 of 60 layers, forward and backward"


def test_the_summary_has_every_kind_and_the_totals() -> None:
    for console in consoles():
        progress = make_progress(Path("some/output"), console)
        report = sample_report()
        play(progress, report)
        text = text_of(console)
        table = {
            line.split()[0]: line.split() for line in text.splitlines() if "_proj" in line or " all " in line
        }
        assert table["q_proj"] == ["q_proj", "3", "24", "24", "24", "0.609", "0.110", "0.120", "1.04"]
        assert table["all"][1] == "15"
        assert f"{report.kept_parameters:,} of {report.dense_parameters:,}" in text
        assert "1 min 15 s" in text
        assert "1.20 GB of memory" in text
        assert "some/output" in text


def test_a_terminal_sees_bars_with_the_last_errors() -> None:
    _, console = consoles()
    progress = TerminalProgress(console)
    progress.sampling(5, 10)
    progress.sampling(10, 10)
    progress.layer_started(0, 2)
    progress.module_done(module("q_proj", 0, 24))
    progress._bars.refresh()
    assert "q_proj rank 24, output error 0.100" in text_of(console)
    progress.layer_done(LayerReport(layer=0, flow_error=0.0321, seconds=1))
    progress._bars.refresh()
    assert "flow error 0.0321" in text_of(console)
    progress.message("a note")
    progress.summary(sample_report())
    assert "a note" in text_of(console)
    assert progress._bars.finished or not progress._bars.live.is_started


def test_brackets_in_names_are_no_markup() -> None:
    for console in consoles():
        progress = make_progress(Path("out/[red]x"), console)
        progress.message("resuming in [bold]dir[/bold]")
        progress.summary(sample_report(model="[link=x]name"))
        for name in ("[bold]dir[/bold]", "[link=x]name", "out/[red]x"):
            assert name in text_of(console)
