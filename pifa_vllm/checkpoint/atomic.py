"""Files that appear whole or not at all, whatever kills the process or fills the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from pifa_vllm.errors import CheckpointError

# Only setting it tells what it is.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch file beside `target`, push it to the disk, and rename it into place.

    Args:
        target: the file to create or replace.
        write: called with the scratch file's path.

    Raises:
        CheckpointError: if it cannot be written. Nothing is left behind then, nor after Ctrl-C.
    """
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        write(scratch)
        # safetensors makes files that only their owner reads, and a server may run as another user.
        scratch.chmod(0o666 & ~_UMASK)
        sync(scratch)
        os.replace(scratch, target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(target, error) from error
    finally:
        with suppress(
            OSError
        ):  # gone after the rename; and where nothing can be written, this fails likewise
            scratch.unlink(missing_ok=True)


def replace_text(target: Path, text: str) -> None:
    """Create or replace a UTF-8 text file, whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    replace_file(target, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def make_directory(path: Path) -> None:
    """Create a directory, and those above it, unless it is there.

    Raises:
        CheckpointError: if it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def sync(path: Path) -> None:
    """Push a file or directory entry to the disk, so that a power cut cannot undo a later rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(target: Path, error: Exception) -> CheckpointError:
    """Describe a failed write; a full disk says how to go on."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return CheckpointError(f"{target}: the disk is full. Free some space and run the same command again.")
    return CheckpointError(f"{target}: cannot be written ({error}).")
