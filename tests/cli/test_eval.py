"""`eval` prints one figure, or the same in JSON, and exits with 1 on anything that gives none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pifa_vllm.cli import main
from tests.conftest import Twins


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
