from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.compression.calibration import samples
from pifa_vllm.compression.calibration.samples import CalibrationSet, load_samples
from pifa_vllm.errors import CalibrationError
from tests.tiny import save_byte_tokenizer

TEXT = "".join(f"Line {i} is about {i * i} things, çà et là.\n" for i in range(200))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory as far as calibration on text looks at it."""
    directory = tmp_path / "model"
    save_byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 258}))
    return directory


def draw(spec: str | Path, model: Path, **options: Any) -> CalibrationSet:
    settings = {"samples": 4, "length": 32, "seed": 0, **options}
    return load_samples(str(spec), load_tokenizer(model), model_dir=model, **settings)


def decoded(model: Path, drawn: CalibrationSet) -> list[str]:
    return [load_tokenizer(model).decode(row) for row in drawn.tokens]


def text_file(path: Path, text: str = TEXT) -> Path:
    path.write_bytes(text.encode())
    return path


def test_windows_of_a_text_file_are_pieces_of_it(model: Path, tmp_path: Path) -> None:
    path = text_file(tmp_path / "some.txt")
    drawn = draw(path, model)
    assert drawn.tokens.shape == (4, 32)
    assert drawn.tokens.dtype == torch.int64
    whole = load_tokenizer(model)(TEXT, add_special_tokens=False)["input_ids"]
    places = [[i for i in range(len(whole)) if whole[i : i + 32] == row] for row in drawn.tokens.tolist()]
    assert all(places)
    assert drawn.record == {
        "source": "text",
        "name": "some.txt",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "characters": len(TEXT),
        "tokens_available": len(whole),
        "whole_source_read": True,
        "windows": "disjoint, at random starts",
        "samples": 4,
        "length": 32,
        "seed": 0,
        "tokenizer_vocabulary": 258,
    }
    json.dumps(drawn.record)


@pytest.mark.parametrize("characters", [4 * 32, 4 * 32 + 1, 200, 5000])
def test_windows_share_no_token(model: Path, tmp_path: Path, characters: int) -> None:
    text = "".join(f"{i:04d}" for i in range(2000))[:characters]
    whole = load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    for seed in range(3):
        rows = draw(text_file(tmp_path / "some.txt", text), model, seed=seed).tokens.tolist()
        places = sorted(next(i for i in range(len(whole)) if whole[i : i + 32] == row) for row in rows)
        assert all(after - before >= 32 for before, after in itertools.pairwise(places))


def test_the_seed_decides(model: Path, tmp_path: Path) -> None:
    path = text_file(tmp_path / "some.txt")
    assert torch.equal(draw(path, model).tokens, draw(path, model).tokens)
    assert not torch.equal(draw(path, model).tokens, draw(path, model, seed=1).tokens)


def test_blocks_tokenise_as_the_whole_text_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text_file(tmp_path / "some.txt")
    whole = draw(path, model)
    monkeypatch.setattr(samples, "_BLOCK_CHARACTERS", 100)
    monkeypatch.setattr(samples, "_BLOCKS_PER_BATCH", 3)
    assert torch.equal(draw(path, model).tokens, whole.tokens)


@pytest.mark.parametrize("text", ["x" * 1000, "word " * 200, "\n" * 1000, TEXT])
def test_blocks_lose_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_BLOCK_CHARACTERS", 64)
    pieces = (text[i : i + 300] for i in range(0, len(text), 300))
    blocks = list(samples._blocks(samples._Text(pieces, "", 10**6)))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 64


def test_no_more_is_read_than_is_needed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_MAX_CHARACTERS", 500)
    monkeypatch.setattr(samples, "_CHARACTERS_PER_TOKEN", 4)
    drawn = draw(text_file(tmp_path / "some.txt"), model)
    assert drawn.record["characters"] == 4 * 4 * 32
    assert drawn.record["whole_source_read"] is False


def test_json_lines_take_text_another_field_or_a_chat(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"text": "plain " * 30}, {"messages": [{"role": "user", "content": "hello " * 30}]}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    drawn = draw(path, model, samples=1, length=350)
    assert "plain \n\nuser: hello" in decoded(model, drawn)[0]
    assert drawn.record["source"] == "jsonl"
    path.write_text(json.dumps({"text": "no", "body": "body " * 50}))
    assert "body body" in decoded(model, draw(path, model, field="body"))[0]


def test_lone_surrogates_in_json_are_replaced(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "' + "\\ud800" * 200 + '"}')
    assert decoded(model, draw(path, model))[0] == "?" * 32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "found none"),
        ("empty.jsonl", b"\n\n", "found none"),
        ("latin.txt", "déjà".encode("latin-1"), "expected UTF-8 text, found byte 0xe9"),
        ("short.txt", b"only a few words", "need 128 tokens, found 16 in 16 characters"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": ', "line 2: expected one JSON object a line"),
        ("list.jsonl", b"[1, 2]", "line 1: expected a JSON object, found list"),
        ("other.jsonl", b'{"body": "x"}', r"field 'text', found the fields \['body'\]"),
        ("number.jsonl", b'{"text": 3}', "field 'text', found 3"),
        ("chat.jsonl", b'{"messages": ["hi"]}', r"chat messages with roles.* found \['hi'\]"),
    ],
)
def test_unusable_files_are_named(
    model: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        draw(path, model)
    assert str(path) in str(caught.value)


def test_a_chat_needs_a_chat_template(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(CalibrationError, match="no chat template"):
        draw(path, model)


def test_a_failing_chat_template_is_named(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(
        CalibrationError, match=r"line 1: the tokenizer's chat template .*roles must alternate"
    ):
        draw(path, model)


def test_a_tokenizer_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps({"vocab_size": 40}))
    with pytest.raises(CalibrationError, match=r"token id \d+ .* found vocab_size 40"):
        draw(text_file(tmp_path / "some.txt"), model)


def test_a_dataset_is_read_through_datasets(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = "\n".join(json.dumps({"text": f"row {i} " * 10}) for i in range(20))
    (folder / "validation.jsonl").write_text(rows)
    drawn = draw(f"{folder}::validation", model)
    assert "row" in decoded(model, drawn)[0]
    assert drawn.record["source"] == "dataset"
    assert drawn.record["split"] == "validation"
    with pytest.raises(CalibrationError, match="field 'body'"):
        draw(f"{folder}::validation", model, field="body")
    with pytest.raises(CalibrationError, match="cannot be read: ValueError"):
        draw(f"{folder}::nosuchsplit", model)


def test_the_usual_datasets_are_asked_for_by_their_usual_names(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((path, config, options["split"], options["data_files"]))
        return [{"text": TEXT}, {"text": ""}, {"text": TEXT}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert draw("wikitext2", model).record["characters"] == 2 * len(TEXT) + 4
    draw("c4", model)
    shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None),
        ("allenai/c4", None, "train", shard),
    ]


def test_without_datasets_it_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'pifa-vllm\[data\]'"):
        draw("wikitext2", model)


def test_without_network_it_says_what_else_to_give(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        CalibrationError, match=r"Couldn't reach the Hub and more.*or --calibration self"
    ) as caught:
        draw("c4", model)
    assert "\n" not in str(caught.value)
