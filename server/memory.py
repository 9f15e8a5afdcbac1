"""How much memory the server's processes and devices hold."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_PARTS = ("total", "weights", "kv_cache", "other")


@dataclass(frozen=True)
class Memory:
    """In bytes.

    Attributes:
        resident: by role: api, engine (with workers of their own process), worker, other.
        ranks: by engine and rank: total, weights, kv_cache, other.
    """

    resident: dict[str, int]
    ranks: dict[tuple[int, int], dict[str, int]]


def return_free_memory() -> None:
    """Give the system back what this process has freed: glibc keeps 300 MB of pydantic's errors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def measure(workers: list[dict[str, Any]]) -> Memory:
    """Measure the processes now.

    Args:
        workers: from `PIFAWorkerExtension.pifa_memory` of every rank, or none.
    """
    ranks = {(w["engine"], w["rank"]): {part: w[part] for part in _PARTS} for w in workers}
    return Memory(resident_by_role({worker["pid"] for worker in workers}), ranks)


def resident_by_role(worker_pids: set[int]) -> dict[str, int]:
    """Sum the resident memory of the server's processes.

    Returns:
        Bytes by role. vLLM names its processes; those whose name says nothing are `other`.
    """
    resident = dict.fromkeys(("api", "engine", "worker", "other"), 0)
    root = psutil.Process(server_pid())
    for process in [root, *root.children(recursive=True)]:
        try:
            name, rss = process.name(), process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        if process.pid in (root.pid, os.getpid()) or "APIServer" in name:
            role = "api"
        elif "EngineCore" in name:
            role = "engine"
        else:
            role = "worker" if process.pid in worker_pids else "other"
        resident[role] += rss
    return resident


def server_pid() -> int:
    """The process that was started as the server: this one, or the parent of several API server processes."""
    return os.getpid() if multiprocessing.parent_process() is None else os.getppid()


@dataclass(frozen=True)
class Usage:
    """Main memory in bytes, of the machine, or of the container where its limit is less."""

    total: int
    used: int


# Limit, use, and the line in `statistics` that counts cached files, which are given back where memory is short.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def main_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Usage:
    """How much main memory there is, and how much of it is in use, by whichever process.

    Args:
        cgroup: where the kernel shows the container's limits, of version 2 or 1.
    """
    machine = psutil.virtual_memory()
    for limit, current, statistics, cached in _CGROUPS:
        try:
            text = (cgroup / limit).read_text().strip()
            if not text.isdigit() or int(text) >= machine.total:
                continue
            files = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
            used = int((cgroup / current).read_text()) - int(files.get(cached, 0))
        except (OSError, ValueError):
            continue
        return Usage(int(text), max(0, used))
    return Usage(machine.total, machine.total - machine.available)
