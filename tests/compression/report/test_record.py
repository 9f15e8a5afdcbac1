"""Figures measured after the run reach the report, the page and the card, and nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pifa_vllm.compression.report import record as module
from pifa_vllm.compression.report.record import read_report, record
from pifa_vllm.compression.report.render import render_files
from pifa_vllm.compression.report.schema import CARD_NAME, HTML_NAME, REPORT_NAME, Evaluation
from pifa_vllm.errors import CheckpointError
from tests.compression.report.sample_report import sample_report

SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: [en, no]\n---\n# The dense one\n"


def measured(value: float, **changes: object) -> Evaluation:
    values: dict[str, object] = {
        "model": "mpifa",
        "value": value,
        "data": "heldout|text.txt",
        "tokens": 16376,
        "nll": 3.0,
        "windows": 8,
        "seqlen": 2048,
        "special_tokens": False,
        "engine": "transformers",
        "dtype": "float32",
        "text_sha256": "ab" * 32,
    }
    return Evaluation.model_validate({**values, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in render_files(sample_report(evaluation=[]), SOURCE_CARD).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_figure_reaches_report_page_and_card(directory: Path) -> None:
    assert "No evaluation on unseen text" in (directory / CARD_NAME).read_text()
    assert sorted(record(directory, [measured(31.25)])) == [CARD_NAME, HTML_NAME, REPORT_NAME]
    assert read_report(directory).evaluation == [measured(31.25)]
    card, page = (directory / CARD_NAME).read_text(), (directory / HTML_NAME).read_text()
    source = r"heldout\|text.txt, 8 windows of 2048 tokens"
    assert f"| mpifa | {source} | 16,376 | perplexity | 31.25 | transformers, float32 |" in card
    assert "<td>31.25</td>" in page
    assert all("No evaluation on unseen text" not in text for text in (card, page))
    # What the card took over from the source's card is still there.
    assert "license: apache-2.0\nlanguage:\n- en\n- false\n" in card
    assert not list(directory.glob(".*"))


def test_the_same_measurement_replaces_and_another_one_joins(directory: Path) -> None:
    record(directory, [measured(31.25)])
    record(directory, [measured(30.0, nll=2.9, text_sha256="cd" * 32), measured(30.5, engine="vllm")])
    record(directory, [measured(40.0, windows=4)])
    assert [x.value for x in read_report(directory).evaluation] == [30.0, 30.5, 40.0]
    assert "31.25" not in (directory / CARD_NAME).read_text()


def test_a_card_that_somebody_changed_or_removed_is_theirs(directory: Path) -> None:
    path = directory / CARD_NAME
    path.write_text(path.read_text() + "\nMy own words.\n")
    assert CARD_NAME not in record(directory, [measured(31.25)])
    assert "My own words." in path.read_text()
    path.unlink()
    assert CARD_NAME not in record(directory, [measured(31.25)])
    assert not path.exists()


def test_killed_between_the_files_the_same_command_completes_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.replace_text

    def failing(target: Path, text: str) -> None:
        if target.name == REPORT_NAME:
            raise CheckpointError("the disk is full")
        original(target, text)

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_text", failing)
        with pytest.raises(CheckpointError, match="full"):
            record(directory, [measured(31.25)])
    assert read_report(directory).evaluation == []
    assert len(record(directory, [measured(31.25)])) == 3
    assert read_report(directory).evaluation == [measured(31.25)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; expected the report that `pifa-vllm compress` writes"),
        ("{", "report: Invalid JSON"),
        ('{"format_version": 2}', "format_version: Input should be 1, found '2'"),
    ],
)
def test_without_a_valid_report_it_says_so(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / REPORT_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        record(tmp_path, [measured(31.25)])
    assert str(tmp_path / REPORT_NAME) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ([REPORT_NAME] if text is not None else [])
