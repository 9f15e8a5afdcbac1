"""Sequences share no token, and each pass sees all of them in an order of its own."""

from __future__ import annotations

from pathlib import Path

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.healing.text import batch_indices, load_text
from tests.healing.tiny_heal import Family, tiny_heal


def test_the_text_is_divided_and_its_end_judges(family: Family, tmp_path: Path) -> None:
    text = load_text(
        tiny_heal(family, tmp_path / "out", held_out=0.25),
        DenseModel(family.dense),
        tmp_path,
        lambda *_: None,
    )
    stream = load_tokenizer(family.dense)(family.text.read_text(), add_special_tokens=False)["input_ids"]
    found = [*text.train.flatten().tolist(), *text.held_out.flatten().tolist()]
    assert found == stream[: len(found)]
    assert len(stream) - len(found) < 48
    assert len(text.held_out) == round(0.25 * (len(text.train) + len(text.held_out)))
    assert text.record["windows"] == "disjoint, in the source's order"


def test_no_more_is_read_than_is_seen(family: Family, tmp_path: Path) -> None:
    options = tiny_heal(family, tmp_path / "out", tokens=10 * 48, held_out=0.2)
    text = load_text(options, DenseModel(family.dense), tmp_path, lambda *_: None)
    assert (len(text.train), len(text.held_out)) == (10, 2)


def test_every_pass_is_in_another_order() -> None:
    seen = [index for step in range(15) for index in batch_indices(step, 4, 20, seed=3)]
    passes = [seen[:20], seen[20:40], seen[40:]]
    assert all(sorted(x) == list(range(20)) for x in passes)
    assert passes[0] != passes[1] != passes[2]
    assert batch_indices(7, 4, 20, seed=3) == seen[28:32]
    assert batch_indices(0, 4, 20, seed=4) != seen[:4]
