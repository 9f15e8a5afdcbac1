"""Publishes a checkpoint in child processes that die on the way. Run as a script by test_writer.py.

It is a process of its own so that children can be forked before torch has started any thread.

    python -m tests.checkpoint.killed_writer steps|random|limited DIRECTORY
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pifa_vllm.checkpoint import Checkpoint, writer
from pifa_vllm.errors import CheckpointError
from tests.checkpoint.sample import Sample


def publish(root: Path) -> None:
    Sample().publish(root / "out", root / "staging")


def fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    return pid


def state(root: Path) -> str:
    """What a loader makes of the output, and of the staging directory."""
    if (root / "out").exists():
        Checkpoint.open(root / "out").verify()
        return "published"
    if not (root / "staging").exists():
        return "nothing"
    try:
        Checkpoint.open(root / "staging").verify()
    except CheckpointError:
        return "partial"
    return "complete"


def die_at(step: int) -> None:
    """Kill this process before its `step`-th file operation, or with a shard's scratch file half written."""
    taken = 0

    def count() -> None:
        nonlocal taken
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        taken += 1

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count()
            return function(*args, **options)

        return call

    def half_saved(tensors: dict[str, Any], path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        count()
        path.write_bytes(content)

    save_file = writer.save_file
    writer.save_file = counted(half_saved)
    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def steps(root: Path) -> list[str]:
    """Die at each step in turn, always going on in the same staging directory, until a child gets through."""
    states = []
    for step in range(1000):
        pid = fork(lambda step=step: (die_at(step), publish(root)))
        _, status = os.waitpid(pid, 0)
        states.append(state(root))
        if not os.WIFSIGNALED(status):
            break
    return states


def at_random(root: Path) -> list[str]:
    """Die at random moments, 30 times, each in a directory of its own."""
    generator = random.Random(0)
    started = time.monotonic()
    os.waitpid(fork(lambda: publish(root / "whole")), 0)
    duration = time.monotonic() - started
    states = []
    for i in range(30):
        pid = fork(lambda i=i: publish(root / str(i)))
        time.sleep(generator.uniform(0, 1.2 * duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        states.append(state(root / str(i)))
    return states


def limited(root: Path) -> list[str]:
    """Write with a limit on the size of files, which is how a test without root comes to a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    made = writer.CheckpointWriter(root / "out", root / "staging")
    messages = []
    for write in (
        lambda: made.write_shard("big.safetensors", {"a": torch.zeros(10000)}),
        lambda: made.write_text("big.txt", "x" * 10000),
        lambda: made.write_json("big.json", {"x": "x" * 10000}),
    ):
        try:
            write()
        except CheckpointError as error:
            messages.append(str(error))
    return [*messages, *sorted(path.name for path in (root / "staging").iterdir())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode = {"steps": steps, "random": at_random, "limited": limited}[sys.argv[1]]
    print(json.dumps(mode(Path(sys.argv[2]))))
