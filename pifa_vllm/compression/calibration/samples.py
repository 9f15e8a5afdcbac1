"""Calibration tokens: from a text file, a JSONL file, a Hugging Face dataset, or the model itself.

Text is treated as the field does it (GPTQ, SparseGPT, SVD-LLM): documents are joined to one stream of tokens
without special tokens between them, and windows of equal length are cut from it at random starts; here so that no
two share a token, since what is fitted to some windows is judged on others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pifa_vllm.checkpoint import read_json
from pifa_vllm.compression.calibration.documents import (
    is_file_spec,
    is_json_lines,
    parse_dataset,
    read_dataset,
    read_json_lines,
    read_text,
)
from pifa_vllm.compression.calibration.self_sampling import sample_from_model
from pifa_vllm.compression.calibration.token_file import read_tokens
from pifa_vllm.errors import CalibrationError

# Text beyond this many characters is not read, unless more are needed for disjoint windows: WikiText-2's whole
# training split fits (11 million), and the random starts have more than enough to choose from.
_MAX_CHARACTERS = 16 << 20
_CHARACTERS_PER_TOKEN = 16
# A tokenizer's working memory is many times its input, so the stream is tokenised in blocks.
_BLOCK_CHARACTERS = 1 << 17
_BLOCKS_PER_BATCH = 8


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens and where they are from.

    Attributes:
        tokens: int64 [samples, length].
        record: provenance in JSON types: source, name, sha256, samples, length, seed, ...
    """

    tokens: Tensor
    record: dict[str, Any]


def load_samples(
    spec: str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    model_dir: Path,
    field: str = "text",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Draw calibration sequences from a source; the same arguments give the same tokens.

    Args:
        spec: a UTF-8 text file; a .jsonl, .json or .ndjson file with one object a line; a .safetensors file of
            tokens (see `token_file`); a dataset name, "wikitext2", "c4" or "name[:config][:split]"; or "self",
            the model's own samples.
        tokenizer: the model's transformers tokenizer.
        samples: number of sequences.
        length: tokens per sequence.
        seed: of the random starts, or of the model's samples.
        model_dir: the dense model's directory.
        field: key of the text in JSONL records and dataset rows.
        device: where the model runs for "self".
        on_progress: called with tokens done and tokens in all while the model samples.

    Raises:
        CalibrationError: if the source is missing, empty, unreadable or too short, or its tokens are not the
            model's.
    """
    if spec == "self":
        tokens, how = sample_from_model(
            model_dir,
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            on_progress=on_progress,
        )
        record = {"source": "self", **how, "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}
    elif spec.endswith(".safetensors"):
        tokens, record = read_tokens(Path(spec).expanduser(), samples, length)
    else:
        tokens, record = _windows(spec, tokenizer, samples=samples, length=length, seed=seed, field=field)
    _check_vocabulary(int(tokens.max()), tokenizer, model_dir)
    drawn = {"samples": samples, "length": length, "seed": seed, "tokenizer_vocabulary": len(tokenizer)}
    # A token file's record has the seed that drew it, which is not this run's.
    return CalibrationSet(tokens, drawn | record)


def load_sequences(
    spec: str,
    tokenizer: Any,
    *,
    most: int,
    length: int,
    seed: int,
    model_dir: Path,
    field: str = "text",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Cut a source into sequences that share no token, in its order, as training needs them.

    Args:
        spec: as `load_samples` takes it; of a file of tokens, the sequences that it holds.
        tokenizer: the model's transformers tokenizer.
        most: sequences at most; "self" samples this many, other sources may have fewer.
        length: tokens per sequence; what does not fill a last one is dropped.
        seed: of the model's samples.
        model_dir: the dense model's directory.
        field: key of the text in JSONL records and dataset rows.
        device: where the model runs for "self".
        on_progress: called with tokens done and tokens in all while the model samples.

    Raises:
        CalibrationError: if the source is missing, empty or unreadable, does not fill one sequence, or its tokens
            are not the model's.
    """
    if spec == "self":
        return load_samples(
            spec,
            tokenizer,
            samples=most,
            length=length,
            seed=seed,
            model_dir=model_dir,
            device=device,
            on_progress=on_progress,
        )
    if spec.endswith(".safetensors"):
        tokens, record = read_tokens(Path(spec).expanduser(), None, length)
    else:
        stream, record = _stream(spec, tokenizer, field, needed=most * length, least=length)
        count = stream.size // length
        tokens = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
    tokens = tokens[:most]
    _check_vocabulary(int(tokens.max()), tokenizer, model_dir)
    drawn = {"samples": len(tokens), "length": length, "tokenizer_vocabulary": len(tokenizer)}
    return CalibrationSet(tokens, record | drawn | {"windows": "disjoint, in the source's order"})


def _windows(
    spec: str, tokenizer: Any, *, samples: int, length: int, seed: int, field: str
) -> tuple[Tensor, dict[str, Any]]:
    """Cut disjoint windows at random starts from a source's stream: int64 [samples, length], and its record."""
    stream, record = _stream(spec, tokenizer, field, needed=samples * length, least=samples * length)
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randint(0, stream.size - samples * length + 1, (samples,), generator=generator)
    starts = gaps.sort().values + length * torch.arange(samples)
    starts = starts[torch.randperm(samples, generator=generator)]
    tokens = np.stack([stream[start : start + length] for start in starts.tolist()])
    return torch.from_numpy(tokens.astype(np.int64)), {**record, "windows": "disjoint, at random starts"}


def _stream(
    spec: str, tokenizer: Any, field: str, *, needed: int, least: int
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], dict[str, Any]]:
    """Tokenise a source to one stream, int32, of `needed` tokens and more where it has them; and its record.

    Raises:
        CalibrationError: if it has fewer than `least`.
    """
    if is_file_spec(spec):
        path = Path(spec).expanduser()
        lines = is_json_lines(path)
        record: dict[str, Any] = {"source": "jsonl" if lines else "text", "name": path.name}
        documents = read_json_lines(path, field, tokenizer) if lines else read_text(path)
        # The pieces of a text file are one text already; documents get an empty line between them, as the field
        # joins WikiText's.
        separator = "\n\n" if lines else ""
        where = str(path)
    else:
        source = parse_dataset(spec)
        record = {"source": "dataset", "name": source.path, "config": source.config, "split": source.split}
        documents, separator, where = read_dataset(spec, field, tokenizer), "\n\n", f"dataset {spec}"
    if record["source"] != "text":
        record["field"] = field

    text = _Text(documents, separator, max(_MAX_CHARACTERS, needed * _CHARACTERS_PER_TOKEN))
    stream = _tokenize(text, tokenizer)
    if text.characters == 0:
        raise CalibrationError(f"{where}: expected calibration text, found none.")
    if stream.size < least:
        raise CalibrationError(
            f"{where}: these options need {least} tokens, found {stream.size} in {text.characters} characters. "
            "Give more text, or ask for fewer or shorter samples."
        )
    return stream, record | {
        "sha256": text.digest.hexdigest(),
        "characters": text.characters,
        "tokens_available": int(stream.size),
        "whole_source_read": not text.truncated,
    }


class _Text:
    """Joins documents, stops at a limit, and keeps count and digest of what went through."""

    def __init__(self, documents: Iterator[str], separator: str, limit: int) -> None:
        self._documents = documents
        self._separator = separator
        self._limit = limit
        self.characters = 0
        self.truncated = False
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            if self.characters >= self._limit:
                self.truncated = True
                return
            joined = (self._separator if self.characters else "") + document
            piece = joined[: self._limit - self.characters]
            self.truncated = len(piece) < len(joined)
            self.characters += len(piece)
            # JSON can hold lone surrogates, which are no text: tokenizers refuse them.
            encoded = piece.encode("utf-8", "replace")
            self.digest.update(encoded)
            yield encoded.decode("utf-8")


def _tokenize(text: _Text, tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Tokenise the stream, block by block: int32 [tokens]."""
    ids: list[np.ndarray[Any, np.dtype[np.int32]]] = [np.empty(0, np.int32)]
    batch: list[str] = []

    def flush() -> None:
        if batch:
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids.extend(np.asarray(block, np.int32) for block in encoded["input_ids"])
            batch.clear()

    for block in _blocks(text):
        batch.append(block)
        if len(batch) == _BLOCKS_PER_BATCH:
            flush()
    flush()
    return np.concatenate(ids)


def _blocks(pieces: _Text) -> Iterator[str]:
    """Regroup the stream into blocks that end where a line does, so that hardly any token is cut in two."""
    rest = ""
    for piece in pieces:
        rest += piece
        while len(rest) >= _BLOCK_CHARACTERS:
            cut = rest.rfind("\n", 0, _BLOCK_CHARACTERS) + 1 or rest.rfind(" ", 0, _BLOCK_CHARACTERS)
            cut = cut if cut > 0 else _BLOCK_CHARACTERS
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _check_vocabulary(largest: int, tokenizer: Any, model_dir: Path) -> None:
    path = model_dir / "config.json"
    size = read_json(path).get("vocab_size")
    if not isinstance(size, int) or largest >= size:
        raise CalibrationError(
            f"{path}: the tokenizer gave token id {largest} (it knows {len(tokenizer)} tokens), expected ids below "
            f"the model's vocab_size, found vocab_size {size!r}. Tokenizer and model do not belong together."
        )
