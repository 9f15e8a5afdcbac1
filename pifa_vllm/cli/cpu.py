"""What vLLM's defaults make too small, too greedy or too many on a CPU."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import psutil
from pifa_vllm_server.memory import main_memory

from pifa_vllm.errors import PifaError

# Beyond this, vLLM's own binding of threads to NUMA nodes is right; below, it keeps back a core that matters.
_FEW_CORES = 4
# Of the memory that is free when the server starts.
_KV_CACHE_SHARE = 0.25
_SHARED_MEMORY = Path("/dev/shm")
# What vLLM 0.32 asks for: ten messages to the ranks, of 16 MiB unless VLLM_MQ_MAX_CHUNK_BYTES_MB says otherwise,
# and ten of 24 MiB from each of them.
_MESSAGES, _MESSAGE_MIB, _RANK_MESSAGE_MIB = 10, 16, 24
_MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
_BIND, _OWN_PROCESS = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"


def set_cpu_defaults(arguments: argparse.Namespace, flags: list[str]) -> dict[str, str]:
    """On a CPU, choose memory, threads and processes, unless the user said otherwise.

    vLLM claims 92 % of the memory, which fails as soon as anything else runs there, and keeps back a core, which on
    two cores is half of the machine. It gives the model a process of its own, because only before a process starts
    can its threads be bound to a NUMA node. With few cores there is nothing to bind: the engine's process then
    computes, too, which saves a process that imports vLLM, a queue, and the core on which the engine waits for it.

    Args:
        arguments: from `parse_arguments`.
        flags: the user's flags that they come from.

    Returns:
        The environment variables that were set.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    defaults = {}
    if not any(flag.replace("_", "-").startswith(_MEMORY_FLAGS) for flag in flags):
        memory = main_memory()
        share = int((memory.total - memory.used) * _KV_CACHE_SHARE)
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, share >> 30))
    if not {_BIND, _OWN_PROCESS} & os.environ.keys() and arguments.distributed_executor_backend is None:
        defaults |= _threads(_ranks(arguments), arguments.data_parallel_size)
    chosen = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(chosen)
    return chosen


def _threads(ranks: int, replicas: int) -> dict[str, str]:
    """What shares out the cores to so many ranks of so many replicas."""
    cores = sorted(os.sched_getaffinity(0))
    few = len(cores) <= _FEW_CORES
    if ranks == 1 and (few or _missing_shared_memory(replicas)):
        usable = len(cores) if few else min(len(cores), psutil.cpu_count(logical=False) or len(cores))
        return {_OWN_PROCESS: "0", "OMP_NUM_THREADS": str(max(1, usable // replicas))}
    if not few:
        return {}
    if replicas > 1 or len(cores) < ranks:
        return {_BIND: "nobind", "OMP_NUM_THREADS": str(max(1, len(cores) // (ranks * replicas)))}
    share = len(cores) // ranks
    return {_BIND: "|".join(",".join(map(str, cores[r * share : (r + 1) * share])) for r in range(ranks))}


def check_shared_memory(arguments: argparse.Namespace) -> None:
    """Find out before a minute of loading that vLLM's queues between its processes do not fit, as in a container.

    Args:
        arguments: from `parse_arguments`.

    Raises:
        PifaError: saying how to give a container more.
    """
    from vllm.platforms import current_platform

    # One GPU needs no such queue, and several say so by themselves.
    if not current_platform.is_cpu():
        return
    ranks = _ranks(arguments)
    if ranks == 1 and os.environ.get(_OWN_PROCESS) == "0":
        return
    if (missing := _missing_shared_memory(ranks * arguments.data_parallel_size)) is None:
        return
    needed, free = missing
    raise PifaError(
        f"{_SHARED_MEMORY}: expected {needed} MiB free for the queues between vLLM's processes, found {free}. "
        "Start a container with --shm-size 1g; a Kubernetes pod mounts an emptyDir with medium Memory there."
    )


def _ranks(arguments: argparse.Namespace) -> int:
    """Processes with weights that one engine has, if each is a process of its own."""
    ranks: int = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
    return ranks


def _missing_shared_memory(ranks: int) -> tuple[int, int] | None:
    """MiB needed and free, where that is less."""
    import vllm.envs

    if not _SHARED_MEMORY.is_dir():
        return None
    message = getattr(vllm.envs, "VLLM_MQ_MAX_CHUNK_BYTES_MB", _MESSAGE_MIB)
    needed = _MESSAGES * (message + ranks * _RANK_MESSAGE_MIB)
    free = shutil.disk_usage(_SHARED_MEMORY).free >> 20
    return (needed, free) if free < needed else None
