"""How much memory the server's processes and devices hold."""

from __future__ import annotations

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
        ranks: by rank: total, weights, kv_cache, other.
    """

    resident: dict[str, int]
    ranks: dict[int, dict[str, int]]


def measure(workers: list[dict[str, Any]]) -> Memory:
    """Measure the processes now.

    Args:
        workers: from `PIFAWorkerExtension.pifa_memory` of every rank, or none.
    """
    ranks = {worker["rank"]: {part: worker[part] for part in _PARTS} for worker in workers}
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


def memory_limit() -> int:
    """The machine's memory in bytes, or the container's limit where that is less."""
    limit: int = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit
