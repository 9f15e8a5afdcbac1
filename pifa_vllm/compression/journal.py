"""What makes a killed run resumable: its fingerprint and the record of its finished layers."""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pifa_vllm.checkpoint.atomic import replace_text, write_error
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.report.schema import LayerReport, ModuleReport
from pifa_vllm.errors import PifaError

_SAMPLED_BLOCKS = 256
_BLOCK_BYTES = 4096


class Journal(BaseModel):
    """The state of a run after its last finished layer.

    Attributes:
        inputs: everything the result depends on; a run resumes only with the very same.
        modules: reports of the finished layers' modules.
        layers: reports of the finished layers.
        seconds: wall time so far, over all attempts.
        cpu_seconds: likewise.
        peak_rss_bytes: likewise.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any]
    modules: list[ModuleReport] = []
    layers: list[LayerReport] = []
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the inputs."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Replace the journal on disk, whole or not at all."""
        replace_text(path, self.model_dump_json())

    @classmethod
    def load(cls, path: Path, inputs: dict[str, Any]) -> Journal | None:
        """Read the journal of an earlier attempt; None if there is none.

        Raises:
            PifaError: if it was made from other inputs, naming what differs, or cannot be read.
        """
        if not path.is_file():
            return None
        try:
            journal = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:300]
            raise PifaError(
                f"{path}: the journal of an earlier attempt cannot be read ({reason}). Remove {path.parent} to "
                "start over."
            ) from error
        if journal.inputs != inputs:
            differing = sorted(
                key
                for key in journal.inputs.keys() | inputs.keys()
                if journal.inputs.get(key) != inputs.get(key)
            )
            shown = "; ".join(
                f"{key}: there {_short(journal.inputs.get(key))}, now {_short(inputs.get(key))}"
                for key in differing
            )
            raise PifaError(
                f"{path.parent}: an unfinished run with {len(journal.layers)} finished layers is here, but it was "
                f"started differently ({shown}). Repeat its options to resume it, or remove the directory to "
                "start over."
            )
        return journal


def model_fingerprint(model: DenseModel) -> str:
    """Hash config.json and, per shard, its header and 256 evenly spread blocks of its data.

    Reading all of a 140 GB model to recognise it would cost minutes; a changed model differs in far more than one
    block in 256.
    """
    digest = hashlib.sha256((model.directory / "config.json").read_bytes())
    for path in sorted({entry.file for entry in model.shards.entries.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for block in range(_SAMPLED_BLOCKS):
                file.seek(8 + header + (size - 8 - header) * block // _SAMPLED_BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def lock(directory: Path) -> IO[str]:
    """Hold `directory` for this process until the returned file is closed (or the process dies).

    Raises:
        PifaError: if another process holds it.
    """
    try:
        file = (directory / "lock").open("w")
    except OSError as error:
        raise write_error(directory, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise PifaError(f"{directory}: another process is compressing into this directory.") from None
    return file


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
