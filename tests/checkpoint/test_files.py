"""What lies in a model directory: which links, names, sizes and JSON are taken. Attacks are in tests/attacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pifa_vllm.checkpoint import Checkpoint
from pifa_vllm.checkpoint.files import check_directory, check_name, parse_json, quoted, read_file, reason
from pifa_vllm.errors import CheckpointError
from tests.checkpoint.sample import Sample


def as_hub_cache(directory: Path, root: Path) -> Path:
    """Lay a model out as huggingface_hub does: links in a snapshot to blobs that are called by their hash."""
    snapshot, blobs = root / "models--a--b" / "snapshots" / "0123abcd", root / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_the_layout_of_the_hub_cache_is_taken(tmp_path: Path) -> None:
    snapshot = as_hub_cache(Sample().write(tmp_path / "model"), tmp_path / "hub")
    Checkpoint.open(snapshot).verify()
    # A cache on another disk.
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    Checkpoint.open(tmp_path / "cache" / snapshot.relative_to(tmp_path / "hub")).verify()


def test_a_snapshot_whose_blobs_are_elsewhere_is_refused(tmp_path: Path) -> None:
    snapshot = as_hub_cache(Sample().write(tmp_path / "model"), tmp_path / "hub")
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="expected a file of this directory, found a link to"):
        Checkpoint.open(snapshot)


def test_the_layout_of_a_kubernetes_volume_is_taken(tmp_path: Path) -> None:
    directory = Sample().write(tmp_path / "model")
    (directory / "..2026").mkdir()
    (directory / "..data").symlink_to("..2026")
    (directory / "config.json").rename(directory / "..2026" / "config.json")
    (directory / "config.json").symlink_to("..data/config.json")
    Checkpoint.open(directory).verify()


def test_a_link_to_the_directory_itself_is_taken(tmp_path: Path) -> None:
    Sample().write(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    Checkpoint.open(tmp_path / "link").verify()


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "tokenizer.json",
        "figure.png",
        ".gitattributes",
        "original/x.pth",
        ".cache/x.py",
    ],
)
def test_files_that_no_loader_runs_are_left_alone(name: str, tmp_path: Path) -> None:
    directory = Sample().write(tmp_path / "model")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("{}")
    check_directory(directory)


def test_a_tokenizer_may_be_larger_than_a_config(tmp_path: Path) -> None:
    for name, size in (("tokenizer.json", 40 << 20), ("tokenizer.model", 40 << 20), ("other.json", 15 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    check_directory(tmp_path)
    with (tmp_path / "other.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(
        CheckpointError, match=r"other\.json: expected at most 16777216 bytes, found 17825792"
    ):
        check_directory(tmp_path)


@pytest.mark.parametrize("content", ["[1]", '{"chat_template": "auto_map"}', '{"a": 1, "a": 2}'])
def test_configs_of_tokenizers_need_not_be_strict(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    check_directory(tmp_path)


def test_reading_a_file_does_not_wait_and_does_not_read_too_much(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        read_file(path, 10)
    path.write_bytes(b"0123456789")
    assert read_file(path, 10) == b"0123456789"
    with pytest.raises(CheckpointError, match="expected at most 9 bytes, found 10"):
        read_file(path, 9)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="expected a regular file, found a FIFO"):
        read_file(tmp_path / "fifo", 10)
    with pytest.raises(CheckpointError, match="expected a regular file, found a directory"):
        read_file(tmp_path, 10)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "b": {"a": 1.5e300}}', "[]", "[" * 64 + "]" * 64, '"\\u0070"', "-1e-999"]
)
def test_json_that_is_taken(text: str) -> None:
    assert parse_json(text.encode(), "here") == parse_json(text.encode(), "here", strict=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "key 'a' appears twice"),
        ('[{"x": {"\\u0061": 1, "a": 2}}]', "key 'a' appears twice"),
        ("[NaN]", "expected finite numbers, found 'NaN'"),
        ("[-Infinity]", "expected finite numbers, found '-Infinity'"),
        ("[1e999]", "expected finite numbers, found '1e999'"),
        ("[" * 65 + "]" * 65, "expected at most 64 levels of nesting"),
        ('{"a":' * 65 + "1" + "}" * 65, "expected at most 64 levels of nesting"),
    ],
)
def test_json_that_only_strictness_refuses(text: str, message: str) -> None:
    parse_json(text.encode(), "here", strict=False)
    with pytest.raises(CheckpointError, match=rf"^here: .*{message}"):
        parse_json(text.encode(), "here")


def test_names_can_be_printed() -> None:
    for name in ("model.layers.0.mlp.up_proj", "größe", "x" * 512, "a b"):
        check_name(name, "here")
    for name in ("x" * 513, "a\nb", "a\x1b[2J", "a\ud800", "a\u202eb"):
        with pytest.raises(
            CheckpointError, match=r"^here: expected names of at most 512 printable"
        ) as caught:
            check_name(name, "here")
        assert str(caught.value).isprintable()


def test_quoted_values_are_short_and_can_be_printed() -> None:
    for value in ("x" * 10**6, "\x1b\n", 10**5000, -(10**5000), [1] * 10**6, {"a": "b" * 10**6}):
        assert quoted(value).isprintable()
        assert len(quoted(value)) <= 203


def test_the_errors_of_others_are_short_and_can_be_printed() -> None:
    assert reason(ValueError("unknown `\x1b[2J\x00`\nmore")) == r"unknown `\x1b[2J\x00`"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 10**6))) == 300


def test_quoting_what_is_nested_too_deeply() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert quoted({"a": nested}) == "a nested dict"
