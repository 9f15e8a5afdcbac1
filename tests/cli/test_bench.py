"""How `bench` reads its arguments; tests/bench measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pifa_vllm.bench.quality import measure as module
from pifa_vllm.cli import main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the benchmark was asked for, in place of running it."""
    calls: list[dict[str, Any]] = []

    def quality(model: Path, text: Path, output: Path, work_dir: Path, **options: Any) -> None:
        calls.append({"paths": (model, text, output, work_dir), **options})

    monkeypatch.setattr(module, "quality", quality)
    return calls


QUALITY = ["bench", "quality", "model", "--text", "t.txt", "--output", "o.json", "--work-dir", "w"]


def test_what_it_does_not_know_goes_to_compress(asked: list[dict[str, Any]]) -> None:
    assert (
        main([*QUALITY, "--densities", "0.8,0.5", "--variants", "mpifa,svd", "--seed", "3", "--tile", "4"])
        == 0
    )
    (call,) = asked
    assert call["paths"] == (Path("model"), Path("t.txt"), Path("o.json"), Path("w"))
    assert (call["densities"], call["variants"]) == ([0.8, 0.5], ["mpifa", "svd"])
    assert call["compress_options"] == ["--seed", "3", "--tile", "4"]


def test_its_default_variants_exist(asked: list[dict[str, Any]]) -> None:
    assert main(QUALITY) == 0
    assert set(asked[0]["variants"]) <= set(module.VARIANTS)
    assert all(0.0 < density <= 1.0 for density in asked[0]["densities"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "mpifa,magic"], "--variants: expected some of svd, "),
        (["--variants", "mpifa,magic"], "found magic"),
        (["--densities", "0.8,half"], "--densities: expected numbers and commas, found '0.8,half'"),
        (["--densities", ""], "--densities: expected numbers and commas, found ''"),
        (["--densities", "0.8,1.5"], "--densities: expected numbers in (0, 1], found 1.5"),
        (["--densities", "nan"], "--densities: expected numbers in (0, 1], found nan"),
    ],
)
def test_refusals(
    options: list[str], message: str, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUALITY, *options]) == 1
    assert message in capsys.readouterr().err
    assert asked == []


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
