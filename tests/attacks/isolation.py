"""Runs something in a forked process with limits on time and memory, and says how it ended.

The process is forked from one that has imported everything, so that each run costs milliseconds, and what it takes
is counted from there.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 30.0
MEMORY = 1 << 30


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        outcome: "refused" with an error of this project, "theirs" with one of another library's, "accepted",
            "crashed", "hung", or "out of memory".
        message: the error's.
        result: what the function returned.
        seconds: wall time.
        mebibytes: peak resident memory above that of a process that does nothing.
    """

    outcome: str
    message: str
    result: Any
    seconds: float
    mebibytes: float


def isolated(function: Callable[[], Any], *, seconds: float = SECONDS, memory: int | None = MEMORY) -> Ending:
    """Call a function in a process of its own.

    Args:
        function: returns something that JSON can hold.
        seconds: after which it is killed.
        memory: bytes of address space that it may add; None is no limit.
    """
    idle = _run(lambda: None, seconds, None)
    ended = _run(function, seconds, memory)
    return Ending(
        ended.outcome, ended.message, ended.result, ended.seconds, max(0.0, ended.mebibytes - idle.mebibytes)
    )


def _run(function: Callable[[], Any], seconds: float, memory: int | None) -> Ending:
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(function, writer, memory)
    os.close(writer)
    os.set_blocking(reader, False)
    content, hung = b"", False
    while True:
        try:
            part = os.read(reader, 1 << 16)
            if not part:
                break
            content += part
        except BlockingIOError:
            if time.monotonic() - started > seconds:
                hung = True
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.001)
    os.close(reader)
    _, status, usage = os.wait4(pid, 0)
    taken = time.monotonic() - started
    if hung:
        outcome, message, result = "hung", f"killed after {seconds:.0f} s", None
    elif os.WIFSIGNALED(status) or not content:
        outcome, message, result = "crashed", f"ended by status {status}", None
    else:
        outcome, message, result = json.loads(content)
    return Ending(outcome, message, result, taken, usage.ru_maxrss / 1024)


def _child(function: Callable[[], Any], writer: int, memory: int | None) -> None:
    """Run the function and leave; nothing of the parent's may run here."""
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(quiet, stream)
        if memory is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        told = _call(function)
        os.write(writer, json.dumps(told).encode())
    finally:
        os._exit(0)


def _call(function: Callable[[], Any]) -> tuple[str, str, Any]:
    from pifa_vllm.errors import PifaError

    try:
        return "accepted", "", function()
    except PifaError as error:
        return "refused", str(error), None
    except MemoryError as error:
        return "out of memory", repr(error), None
    except BaseException as error:
        if "memory" in str(error).lower():
            return "out of memory", f"{type(error).__name__}: {error}", None
        return "theirs", f"{type(error).__name__}: {error}", None
