"""Opening what lies in a model directory that may come from a stranger.

What is read here is a regular file of bounded size that belongs to the directory, so nothing waits for a FIFO,
fills the memory before it is looked at, or shows another file of the same user as part of a model.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, Final

from pifa_vllm.errors import CheckpointError

# The largest index or header of a known model has a tenth of this, the largest config.json a tenth of that.
MAX_JSON: Final = 16 << 20
MAX_CONFIG: Final = 1 << 20
# Tokenizers of a quarter of a million tokens have half of this.
_MAX_TOKENIZER: Final = 64 << 20
_MAX_NAME: Final = 512
_MAX_DEPTH: Final = 64

_LIMITS: Final = {".json": MAX_JSON, ".jinja": 1 << 20, ".model": _MAX_TOKENIZER, ".txt": _MAX_TOKENIZER}
_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "added_tokens.json")

# transformers and vLLM unpickle these where they are told to, or find no safetensors.
_PICKLES: Final = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# What they import once they are told to trust remote code.
_CODE: Final = (".dll", ".dylib", ".py", ".pyc", ".pyd", ".so")
# What makes them load another model, or run code, than config.json and the index say.
_MISLEADING: Final = {
    "adapter_config.json": "transformers loads the model that it names in place of this one",
    "params.json": "vLLM reads it in place of config.json",
    "consolidated.safetensors.index.json": "vLLM reads it in place of model.safetensors.index.json",
    "custom_generate": "transformers runs the code in it",
}


def quoted(value: object) -> str:
    """Show a value from a file in a message: escaped, so that a terminal only prints it, and not too long."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value[:200] if isinstance(value, str | list) else value)
    except RecursionError:
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def printable(text: str) -> str:
    """Escape what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: Exception) -> str:
    """Show another library's error in a message: the first line, which may hold anything that is in the file."""
    lines = str(error).strip().split("\n") if str(error).strip() else [type(error).__name__]
    return printable(lines[0][:300])


def check_name(name: str, source: str) -> None:
    """Check that a name of a tensor or module can be printed as it is.

    Raises:
        CheckpointError: naming `source`, if it is too long or has characters that a terminal would obey.
    """
    if len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{source}: expected names of at most {_MAX_NAME} printable characters, found {quoted(name)}."
        )


def read_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is something else, larger, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: expected a regular file, found {_kind(found.st_mode)}.")
        if found.st_size > limit:
            raise CheckpointError(f"{path}: expected at most {limit} bytes, found {found.st_size}.")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def parse_json(data: bytes, source: object, *, strict: bool = True) -> Any:
    """Decode JSON.

    Args:
        data: UTF-8.
        source: the file to name in errors.
        strict: refuse what other readers may take for something else, or stumble over: keys that appear twice,
            numbers that are not finite, and deep nesting.

    Raises:
        CheckpointError: if it is not JSON, or nested too deeply.
    """
    options: dict[str, Any] = {}
    if strict:
        options = {"object_pairs_hook": _unique, "parse_constant": _finite, "parse_float": _finite}
    try:
        value = json.loads(data.decode("utf-8"), **options)
    except (ValueError, RecursionError) as error:  # ValueError includes numbers of thousands of digits
        raise CheckpointError(f"{source}: cannot be read as JSON ({error}).") from error
    if strict and _depth(value) > _MAX_DEPTH:
        raise CheckpointError(f"{source}: expected at most {_MAX_DEPTH} levels of nesting, found more.")
    return value


def check_directory(directory: Path) -> None:
    """Check that a model directory holds nothing that a loader would wait for, obey, unpickle or run.

    Links may lead to files of the same directory, and to the blobs of the Hugging Face cache that it is in. The
    contents of subdirectories are not looked at: no loader reads them by itself.

    Raises:
        CheckpointError: naming the file, expected and found.
    """
    root = directory.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    for path in sorted(directory.iterdir()):
        check_name(path.name, str(directory))
        if path.name in _MISLEADING:
            raise CheckpointError(
                f"{path}: expected no such file in a PIFA checkpoint: {_MISLEADING[path.name]}."
            )
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(home) for home in homes) or not target.exists():
                raise CheckpointError(
                    f"{path}: expected a file of this directory, found a link to {quoted(str(target))}."
                )
        found = path.stat()
        suffix = path.suffix.lower()
        if stat.S_ISDIR(found.st_mode) and suffix not in (*_LIMITS, ".safetensors"):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: expected a regular file, found {_kind(found.st_mode)}.")
        if suffix in _PICKLES or suffix in _CODE:
            kind = "a pickle, which can hold code" if suffix in _PICKLES else "code"
            raise CheckpointError(
                f"{path}: expected safetensors and data only, found {kind} by its name. If you know that it is "
                "harmless, move it out of the checkpoint."
            )
        limit = _MAX_TOKENIZER if path.name in _TOKENIZER_FILES else _LIMITS.get(suffix)
        if limit is not None and found.st_size > limit:
            raise CheckpointError(f"{path}: expected at most {limit} bytes, found {found.st_size}.")
        if path.name.endswith("_config.json"):
            _check_no_code(path)


def _check_no_code(path: Path) -> None:
    """Check that the config of a tokenizer, a processor or the like names no Python classes to import."""
    settings = parse_json(read_file(path, MAX_JSON), path, strict=False)
    if isinstance(settings, dict) and "auto_map" in settings:
        raise CheckpointError(
            f"{path}: auto_map: expected none in a PIFA checkpoint, which runs no code of its own, found "
            f"{quoted(settings['auto_map'])}."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} appears twice in an object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, found {quoted(text)}")
    return value


def _depth(value: Any) -> int:
    """Count the levels of containers, at most one more than are allowed."""
    level, depth = [value], 0
    while depth <= _MAX_DEPTH:
        outer = [inner for inner in level if isinstance(inner, dict | list)]
        if not outer:
            break
        level = [inner for one in outer for inner in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something else")
