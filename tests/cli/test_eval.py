"""`eval` prints one figure, or the same in JSON, and exits with 1 on anything that gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pifa_vllm.cli import main
from pifa_vllm.compression.report.render import render_files
from pifa_vllm.evaluate import tasks
from pifa_vllm.evaluate.tasks import TaskFigure
from tests.compression.report.sample_report import sample_report
from tests.conftest import Twins
from tests.edit import copy_edited


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, naïvely. " * 20, encoding="utf-8")
    return path


def test_json_and_the_line_for_people_agree(
    twins: Twins, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(twins.pifa), "--text", str(text), "--seqlen", "128"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["windows"], found["engine"], found["dtype"]) == (8, "transformers", "float32")
    assert found["nll"] == pytest.approx(sum(found["window_nlls"]) / 8)
    assert main(arguments) == 0
    line = capsys.readouterr().out
    assert f"perplexity {found['perplexity']:.4f}" in line
    assert "8 windows of 128 tokens; transformers, float32" in line


def test_options(twins: Twins, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        options = [
            "--max-windows",
            "1",
            "--dtype",
            "bfloat16",
            "--threads",
            "1",
            "--special-tokens",
            "--json",
        ]
        assert main(["eval", str(twins.dense), "--text", str(text), "--seqlen", "64", *options]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert (found["windows"], found["dtype"], found["special_tokens"]) == (1, "bfloat16", True)
    assert found["standard_error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seqlen", "4096"], "expected at least one window of 4096"),
        (["--seqlen", "600"], "max_position_embeddings is 512"),
        (["--seqlen", "64", "--max-windows", "0"], "at least 1 of them"),
        (["--seqlen", "64", "--threads", "0"], "--threads: expected 1 or more, found 0"),
        (
            ["--seqlen", "64", "--device", "abacus"],
            "--device: expected a device that torch can use, found 'abacus'",
        ),
    ],
)
def test_refusals(
    twins: Twins, text: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(twins.pifa), "--text", str(text), *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_texts_that_cannot_be_read(twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for path in (tmp_path / "latin.txt", tmp_path / "nowhere.txt", tmp_path):
        assert main(["eval", str(twins.pifa), "--text", str(path)]) == 1
        assert f"{path}: cannot be read as UTF-8 text" in capsys.readouterr().err


def test_record_adds_the_figure_to_the_reports(
    twins: Twins, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy_edited(twins.pifa, tmp_path / "model")
    for name, content in render_files(sample_report(evaluation=[])).items():
        (directory / name).write_text(content)
    arguments = ["eval", str(directory), "--text", str(text), "--seqlen", "64", "--json", "--record"]
    assert main([*arguments, "--max-windows", "2"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert f"recorded in {directory / 'README.md'}, " in err
    (row,) = json.loads((directory / "compression_report.json").read_text())["evaluation"]
    assert (row["value"], row["nll"]) == (found["perplexity"], found["nll"])
    assert (row["tokens"], row["windows"], row["seqlen"]) == (126, 2, 64)
    assert (row["model"], row["data"], row["engine"], row["dtype"]) == (
        "mpifa",
        "text.txt",
        "transformers",
        "float32",
    )
    assert f"{found['perplexity']:.4g}" in (directory / "README.md").read_text()


def test_record_needs_a_report_before_anything_is_measured(
    twins: Twins, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(twins.pifa), "--text", str(text), "--seqlen", "64", "--record"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{twins.pifa / 'compression_report.json'}: no such file" in err


def test_tasks_are_recorded_like_perplexity(
    twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def run_tasks(directory: Path, names: list[str], **options: Any) -> list[TaskFigure]:
        asked.append({"names": names, **options})
        value = 0.25 if options["engine"] == "vllm" else 0.5
        return [TaskFigure("hellaswag", "acc_norm", value, 0.05, 100, 0, "1.0", options["engine"], "float32")]

    monkeypatch.setattr(tasks, "run_tasks", run_tasks)
    directory = copy_edited(twins.pifa, tmp_path / "model")
    for name, content in render_files(sample_report(evaluation=[])).items():
        (directory / name).write_text(content)
    arguments = ["eval", str(directory), "--tasks", "hellaswag,piqa", "--limit", "100", "--engine", "both"]
    assert main([*arguments, "--record"]) == 0
    assert [x["engine"] for x in asked] == ["transformers", "vllm"]
    assert asked[0]["names"] == ["hellaswag", "piqa"]
    assert (asked[0]["limit"], asked[0]["task_dir"], asked[0]["batch_size"]) == (100, None, 8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hellaswag acc_norm 0.5000 ± 0.0500  (100 items, 0-shot; transformers, float32)"
    rows = json.loads((directory / "compression_report.json").read_text())["evaluation"]
    assert [(x["model"], x["metric"], x["value"], x["engine"]) for x in rows] == [
        ("mpifa", "acc_norm", 0.5, "transformers"),
        ("mpifa", "acc_norm", 0.25, "vllm"),
    ]
    assert rows[0]["data"] == "hellaswag, first 100 items, 0-shot"
    assert "hellaswag, first 100 items, 0-shot" in (directory / "README.md").read_text()


@pytest.mark.parametrize("options", [[], ["--text", "t.txt", "--tasks", "piqa"]])
def test_either_a_text_or_tasks(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "model", *options])
    assert caught.value.code == 2
    assert "--tasks" in capsys.readouterr().err
