"""Documents come out of every source one by one, whole, and no more of them than are asked for."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.compression.calibration import documents
from pifa_vllm.compression.calibration.documents import (
    DATASETS,
    DatasetSource,
    is_file_spec,
    is_json_lines,
    parse_dataset,
    read_dataset,
    read_json_lines,
    read_text,
)
from pifa_vllm.errors import CalibrationError
from tests.tiny import save_byte_tokenizer


def test_what_is_a_file_and_what_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    (tmp_path / "folder").mkdir()
    files = ("notes", "missing.jsonl", "./c4", "/nowhere", "~/text", "MISSING.TXT")
    datasets = ("wikitext2", "c4", "org/name", "org/name:config:split", "folder", str(tmp_path))
    assert all(map(is_file_spec, files))
    assert not any(map(is_file_spec, datasets))
    assert [is_json_lines(Path(name)) for name in ("a.jsonl", "a.JSON", "a.txt", "jsonl")] == [
        True,
        True,
        False,
        False,
    ]


def test_dataset_names() -> None:
    assert parse_dataset("org/name") == DatasetSource("org/name", None, "train")
    assert parse_dataset("org/name:en") == DatasetSource("org/name", "en", "train")
    assert parse_dataset("org/name::test") == DatasetSource("org/name", None, "test")
    assert parse_dataset("org/name:en:test") == DatasetSource("org/name", "en", "test")
    assert parse_dataset("wikitext2") == DATASETS["wikitext2"]
    for bad in ("a:b:c:d", ":config", ""):
        with pytest.raises(CalibrationError, match="expected a text file"):
            parse_dataset(bad)


def test_a_text_file_comes_in_pieces_that_are_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces count characters: one that ends within a character of several bytes must not be cut there.
    monkeypatch.setattr(documents, "_READ_CHARACTERS", 7)
    text = "çà et là\r\nzwei\rdrei\n" * 20
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    pieces = list(read_text(path))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 7


def test_a_text_that_is_no_text_further_on_is_an_error_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_READ_CHARACTERS", 10)
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * 100_000 + b"\xff")
    pieces = read_text(path)
    assert next(pieces) == "x" * 10
    with pytest.raises(CalibrationError, match="expected UTF-8 text, found byte 0xff"):
        list(pieces)
    with pytest.raises(CalibrationError, match=r"cannot be read as calibration text \(Is a directory\)"):
        next(read_text(tmp_path))


def test_json_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two\\nlines\\u2028"}\n{"text": ""}\nbroken\n')
    found = read_json_lines(path, "text", tokenizer=None)
    assert list(islice(found, 3)) == ["one", "two\nlines\u2028", ""]
    with pytest.raises(
        CalibrationError, match=r"some\.jsonl: line 6: expected one JSON object a line, found 'broken'"
    ):
        next(found)


def test_chats_are_rendered_and_named_fields_come_before_messages(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_saved(tmp_path / "tokenizer"))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, ({"messages": chat}, {"text": chat}, {"text": "plain", "messages": chat})))
    )
    rendered = "user: hi\nassistant: hello\n"
    assert list(read_json_lines(path, "text", tokenizer)) == [rendered, rendered, "plain"]


@pytest.mark.parametrize("chat", [[], [{"content": "no role"}], {"role": "user"}, None])
def test_what_is_no_chat_is_refused(chat: object, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(
        CalibrationError, match=r"line 1: expected text, or a list of chat messages with roles"
    ):
        list(read_json_lines(path, "text", tokenizer=None))


def test_a_dataset_is_not_read_beyond_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    read = []

    def load_dataset(*_: Any, **options: Any) -> Any:
        assert options["streaming"]
        for i in range(1000):
            read.append(i)
            yield {"text": f"row {i}"} if i != 3 else {"body": "x"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_dataset("org/name", "text", tokenizer=None)
    assert list(islice(found, 3)) == ["row 0", "row 1", "row 2"]
    assert read == [0, 1, 2]
    with pytest.raises(CalibrationError, match=r"dataset org/name: row 3: .*found the fields \['body'\]"):
        next(found)


def _saved(directory: Path) -> Path:
    save_byte_tokenizer(directory)
    return directory
