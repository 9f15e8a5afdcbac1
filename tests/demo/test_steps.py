"""The demo's compression and comparison on a tiny stand-in; the real model is `make demo`'s."""

import json

import pytest

from pifa_vllm.checkpoint import Checkpoint
from pifa_vllm.demo import steps
from tests.compression.runs import write_text
from tests.tiny import save_tiny_model


def test_every_step_is_made_once_and_reused(tmp_path, monkeypatch, capsys):
    made = []

    def tiny(directory):
        made.append(directory)
        save_tiny_model(directory)

    monkeypatch.setattr(steps, "save_dense_model", tiny)
    monkeypatch.setattr(steps, "_SEQLEN", 64)
    text = write_text(tmp_path / "text.txt")
    first = steps.Demo(tmp_path / "work", density=0.8, samples=4, length=32, text=text)
    served = first.compress()
    first.compare()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("dense", "svd-llm", "MPIFA", "perplexity"))
    figures = json.loads((tmp_path / "work" / "perplexity.json").read_text())
    assert len(figures) == 3
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()}

    again = steps.Demo(tmp_path / "work", density=0.8, samples=4, length=32, text=text)
    assert again.compress() == served
    again.compare()
    assert len(made) == 1
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()}

    int8 = steps.Demo(tmp_path / "work", density=0.8, samples=4, length=32, text=text, factors="int8")
    smaller = int8.compress()
    assert Checkpoint.open(smaller).config.ranks == Checkpoint.open(served).config.ranks
    assert Checkpoint.open(smaller).config.factors is not None
    capsys.readouterr()
    int8.compare()
    assert "MPIFA, int8" in capsys.readouterr().out

    other = steps.Demo(tmp_path / "work", density=0.6, samples=4, length=32, text=text)
    assert other.compress() != served


def test_a_density_out_of_range_is_refused_at_once(tmp_path):
    from pifa_vllm.errors import PifaError

    with pytest.raises(PifaError, match="density"):
        steps.Demo(tmp_path / "work", density=1.5, samples=4, length=32, text=None)
    assert not (tmp_path / "work").exists()
