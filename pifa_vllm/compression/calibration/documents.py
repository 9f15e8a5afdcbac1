"""Calibration text as a stream of documents, from files and from Hugging Face datasets.

Every source yields its documents lazily, so that a source of any size costs only what is read of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pifa_vllm.errors import CalibrationError

# A source is a file if it is one, or if it is written like one; anything else names a dataset.
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_FILE_SUFFIXES = (".txt", ".text", ".md", *_JSON_LINES)
_READ_CHARACTERS = 1 << 20


class DatasetSource(NamedTuple):
    """What `datasets.load_dataset` is asked for."""

    path: str
    config: str | None = None
    split: str = "train"
    data_files: dict[str, str] | None = None
    # Streaming reads only the beginning of a large dataset; a small one is better kept in the local cache.
    streaming: bool = True


# The splits that the field calibrates on.
DATASETS = {
    "wikitext2": DatasetSource("Salesforce/wikitext", "wikitext-2-raw-v1", streaming=False),
    "c4": DatasetSource("allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"}),
}


def is_file_spec(spec: str) -> bool:
    """Tell whether a calibration source is a file (which may be missing) rather than a dataset name."""
    # A directory is left to `datasets`, which reads the JSONL, Parquet, ... files in it.
    if spec in DATASETS or Path(spec.partition(":")[0]).is_dir():
        return False
    written_as_path = spec.startswith(("/", "./", "../", "~")) or spec.lower().endswith(_FILE_SUFFIXES)
    return written_as_path or Path(spec).is_file()


def is_json_lines(path: Path) -> bool:
    """Tell by its suffix whether a file holds one JSON object a line."""
    return path.suffix.lower() in _JSON_LINES


def read_text(path: Path) -> Iterator[str]:
    """Yield a UTF-8 text file in pieces of about a million characters, which together are its text.

    Raises:
        CalibrationError: if the file is missing, not readable, or not UTF-8.
    """
    try:
        # newline="" keeps line ends as they are: the tokenizer sees the file's own text.
        with path.open(encoding="utf-8", newline="") as file:
            while piece := file.read(_READ_CHARACTERS):
                yield piece
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def read_json_lines(path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    """Yield the documents of a file with one JSON object a line.

    Args:
        path: the file.
        field: key of the document; a list of chat messages there, or under "messages" where the key is absent,
            is rendered through the tokenizer's chat template.
        tokenizer: a transformers tokenizer, used for chats only.

    Raises:
        CalibrationError: naming file and line, if the file cannot be read or a record has no document.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(line, field, tokenizer, f"{path}: line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def parse_dataset(spec: str) -> DatasetSource:
    """Read "name[:config][:split]", or one of the short names in `DATASETS`.

    An empty part stands for its default: "org/name::validation" is the default config's validation split.

    Raises:
        CalibrationError: if there are more than three parts or no name.
    """
    if spec in DATASETS:
        return DATASETS[spec]
    name, *rest = spec.split(":")
    if not name or len(rest) > 2:
        raise CalibrationError(
            f"--calibration {spec!r}: expected a text file, a .jsonl file, a dataset as name[:config][:split], "
            f"one of {', '.join(DATASETS)}, or self."
        )
    config, split = (*rest, "", "")[:2]
    return DatasetSource(name, config or None, split or "train")


def read_dataset(spec: str, field: str, tokenizer: Any) -> Iterator[str]:
    """Yield the documents of a Hugging Face dataset, downloading no more than is consumed where it can stream.

    Raises:
        CalibrationError: if the `datasets` package is missing, the dataset cannot be had, or it has no such field.
    """
    source = parse_dataset(spec)
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"--calibration {spec}: no such file, and reading it as a Hugging Face dataset needs the datasets "
            "package, which is not installed. Install it with: pip install 'pifa-vllm[data]'."
        ) from error
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            source.path,
            source.config,
            split=source.split,
            data_files=source.data_files,
            streaming=source.streaming,
        )
        for number, row in enumerate(rows):
            yield _value(row, field, tokenizer, f"dataset {spec}: row {number}")
    except CalibrationError:
        raise
    except Exception as error:  # each of the many storage back ends of `datasets` raises errors of its own
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"--calibration {spec}: no such file, and the Hugging Face dataset {source.path} (config "
            f"{source.config or 'default'}, split {source.split}) cannot be read: {type(error).__name__}: {reason}."
            " Without network access, give a text or .jsonl file, or --calibration self."
        ) from error


def _document(line: str, field: str, tokenizer: Any, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where}: expected one JSON object a line, found {line.strip()[:40]!r}."
        ) from error
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: expected a JSON object, found {type(record).__name__}.")
    return _value(record, field, tokenizer, where)


def _value(record: dict[str, Any], field: str, tokenizer: Any, where: str) -> str:
    value = record.get(field, record.get("messages"))
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return _render_chat(value, tokenizer, where)
    found = f"the fields {sorted(map(str, record))}" if value is None else repr(value)[:60]
    raise CalibrationError(
        f"{where}: expected text, or a list of chat messages with roles, in field {field!r}, found {found}."
    )


def _render_chat(messages: list[Any], tokenizer: Any, where: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where}: holds chat messages, but the model's tokenizer has no chat template."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program: it can fail in any way
        raise CalibrationError(
            f"{where}: the tokenizer's chat template does not take these messages "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> CalibrationError:
    if isinstance(error, FileNotFoundError):
        return CalibrationError(f"{path}: no such file; expected calibration text.")
    if isinstance(error, UnicodeDecodeError):
        return CalibrationError(
            f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} ({error.reason})."
        )
    return CalibrationError(f"{path}: cannot be read as calibration text ({error.strerror}).")
