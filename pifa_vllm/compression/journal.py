"""What makes a killed run resumable: its fingerprint and the record of its finished layers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
import time
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pifa_vllm.checkpoint import Checkpoint
from pifa_vllm.checkpoint.atomic import replace_text, write_error
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.report.schema import LayerReport, ModuleReport
from pifa_vllm.errors import PifaError

_SAMPLED_BLOCKS = 256
_BLOCK_BYTES = 4096


class Costs(BaseModel):
    """What a run has cost so far, over all attempts.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads.
        peak_rss_bytes: the highest of any attempt.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0


class Clock:
    """Time and memory of this attempt, added to what a journal has of the earlier ones."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def record(self, journal: Costs) -> None:
        """Bring a journal's figures up to now."""
        if self._before is None:
            self._before = journal.seconds, journal.cpu_seconds
        journal.seconds = self._before[0] + time.perf_counter() - self._wall
        journal.cpu_seconds = self._before[1] + time.process_time() - self._cpu
        # ru_maxrss is in KiB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        journal.peak_rss_bytes = max(journal.peak_rss_bytes, peak)


class Journal(Costs):
    """The state of a run after its last finished layer.

    Attributes:
        inputs: everything the result depends on; a run resumes only with the very same.
        modules: reports of the finished layers' modules.
        layers: reports of the finished layers.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any]
    modules: list[ModuleReport] = []
    layers: list[LayerReport] = []

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
        check_inputs(path.parent, journal.inputs, inputs, f"{len(journal.layers)} finished layers")
        return journal


def model_fingerprint(model: DenseModel | Checkpoint) -> str:
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


def check_inputs(directory: Path, there: dict[str, Any], now: dict[str, Any], done: str) -> None:
    """Check that the earlier attempt in a work directory, with this much `done`, had the inputs of this one.

    Raises:
        PifaError: naming all that differ.
    """
    if keys := sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key)):
        shown = "; ".join(f"{x}: there {_short(there.get(x))}, now {_short(now.get(x))}" for x in keys)
        raise PifaError(
            f"{directory}: an unfinished run with {done} is here, but it was started differently ({shown}). "
            "Repeat its options to resume it, or remove the directory to start over."
        )


def check_output(output: Path) -> None:
    """Check that there is room for a new directory.

    Raises:
        PifaError: if something is there.
    """
    if output.exists():
        raise PifaError(
            f"{output}: the output directory exists, expected a new one. Choose another one or remove it first."
        )


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
        raise PifaError(f"{directory}: another process is at work in this directory.") from None
    return file


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
