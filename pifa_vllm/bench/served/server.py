"""One vLLM server of the end-to-end benchmark: started, watched, stopped."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from pifa_vllm.errors import PifaError
from pifa_vllm.served import ServerProcess, free_port

_LOADED = re.compile(r"Loading weights took ([\d.]+) seconds")
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
# What decides how a server runs, beside its flags.
_SETTINGS = ("VLLM_", "OMP_", "KMP_", "GOMP_", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES")


class Server(ServerProcess):
    """A server that is measured; it reads its weights from the disk, whether they were read before or not.

    Attributes:
        start: {"seconds": from the start of the process until it is healthy, "weights_seconds": of these, what
            vLLM's loader reports, None where its log does not say}.

    Args:
        name: of the server, also the model's name in its API.
        directory: the checkpoint.
        dtype: to serve it in.
        log: file for the server's output.
        kv_cache_bytes: memory for the KV cache.
        flags: further flags of `vllm serve`.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        dtype: torch.dtype,
        log: Path,
        *,
        kv_cache_bytes: int,
        flags: list[str],
        environment: dict[str, str],
    ) -> None:
        self.name = name
        self.start: dict[str, float | None] = {}
        self._directory = directory
        self._kv_cache_bytes = kv_cache_bytes
        own = ["--served-model-name", name, "--dtype", str(dtype).removeprefix("torch.")]
        # A prompt that was seen before must cost what it cost the first time.
        own += ["--kv-cache-memory-bytes", str(kv_cache_bytes), "--no-enable-prefix-caching"]
        title = f"the server {name}"
        super().__init__(directory, free_port(), log, [*own, *flags], name=title, environment=environment)

    def __enter__(self) -> Self:
        """Start; it is not ready yet."""
        for file in sorted(self._directory.glob("*.safetensors")):
            _forget_pages(file)
        return super().__enter__()

    def wait_until_ready(self) -> None:
        """Return when it is healthy, and note how long that took.

        Raises:
            PifaError: if it does not become ready, with the end of its log.
        """
        super().wait_until_ready()
        loaded = _LOADED.search(self.log.read_text(errors="replace"))
        self.start = {
            "seconds": self.seconds_to_ready,
            "weights_seconds": float(loaded[1]) if loaded else None,
        }

    def memory(self) -> dict[str, int]:
        """Measure its memory so far, in bytes.

        Returns:
            "peak_rss_bytes": the sum of its processes' peaks; "engine_peak_rss_bytes": of the largest, which
            holds the weights; "gpu_bytes": what they hold on NVIDIA GPUs, where there are any; "kv_cache_bytes"
            and "kv_cache_tokens": reserved for the KV cache, and how many tokens fit in that.
        """
        root = psutil.Process(self._process.pid)
        pids = [root.pid, *(child.pid for child in root.children(recursive=True))]
        peaks = [_peak_rss(pid) for pid in pids]
        found = {
            "peak_rss_bytes": sum(peaks),
            "engine_peak_rss_bytes": max(peaks),
            "kv_cache_bytes": self._kv_cache_bytes,
            "kv_cache_tokens": self._kv_cache_tokens(),
        }
        if torch.cuda.is_available():
            found["gpu_bytes"] = _gpu_bytes(set(pids))
        return found

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far."""
        root = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def _kv_cache_tokens(self) -> int:
        text = self.get("/metrics")
        labels: dict[str, str] = (
            dict(re.findall(r'(\w+)="([^"]*)"', match[1])) if (match := _CACHE.search(text)) else {}
        )
        try:
            return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        except (KeyError, ValueError) as error:
            raise PifaError(
                f"{self.url}/metrics: expected num_gpu_blocks and block_size in vllm:cache_config_info, found "
                f"{labels}."
            ) from error


def settings() -> dict[str, str]:
    """The environment variables that every server inherits and that change how it runs."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)}


def _forget_pages(file: Path) -> None:
    """Drop what the system holds of a file in memory, so that the next one to read it waits for the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # pages that are not on the disk yet are not dropped
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has just ended


def _gpu_bytes(pids: set[int]) -> int:
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    rows: list[list[Any]] = [line.split(",") for line in lines if line.strip()]
    return sum(int(mib) << 20 for pid, mib in rows if int(pid) in pids)
