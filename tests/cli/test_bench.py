"""How `bench` reads its arguments; tests/bench measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pifa_vllm.cli import main


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "magic"], ["bench", "quality", "model"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pifa-vllm bench" in capsys.readouterr().err


def test_a_plot_that_cannot_be_drawn_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["bench", "layer", "--output", "out.json", "--plot", "out.svg"])
    assert caught.value.code == 2
    assert "--plot: needs matplotlib" in capsys.readouterr().err


def test_the_table_of_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "table", str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json: no such file" in capsys.readouterr().err
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": [{"variant": "mpifa"}]}))
    assert main(["bench", "table", str(path)]) == 1
    assert f"{path}: expected the results of a `pifa-vllm bench` command" in capsys.readouterr().err
