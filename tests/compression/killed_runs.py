"""Runs in children of this process that kill themselves: `killed_runs.py MODEL TEXT DIRECTORY`.

For every place where a run changes the disk, a forked child is killed there; a second child runs the same thing
again and must finish. The parent never computes, so that forking is safe. Prints one JSON line per place.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pifa_vllm.checkpoint import CheckpointWriter
from pifa_vllm.checkpoint.shards import Shards
from pifa_vllm.compression import pipeline
from pifa_vllm.compression.flows import Flows
from pifa_vllm.compression.journal import Journal
from pifa_vllm.compression.sensitivity import Sensitivity
from tests.compression.runs import Recorder, tiny_options

# (owner, method, call at which to kill, whether before or after it)
PLACES = [
    (Sensitivity, "_write_head_gradients", 1, "after"),
    (Sensitivity, "_backward", 2, "after"),
    (CheckpointWriter, "write_shard", 1, "after"),
    (CheckpointWriter, "write_shard", 2, "before"),
    (Flows, "commit", 1, "before"),
    (Flows, "commit", 2, "after"),
    (Journal, "save", 1, "before"),
    (Journal, "save", 1, "after"),
    (Flows, "discard", 2, "before"),
    (Journal, "save", 3, "after"),
    (CheckpointWriter, "write_text", 1, "before"),
    (CheckpointWriter, "write_json", 1, "after"),
    (CheckpointWriter, "publish", 1, "before"),
    (CheckpointWriter, "publish", 1, "after"),
    (shutil, "rmtree", 1, "before"),
]


def main() -> None:
    """Kill and resume at every place."""
    model, text, directory = map(Path, sys.argv[1:4])
    for index, (owner, method, call, when) in enumerate(PLACES):
        output = directory / f"out-{index}"

        def killed(owner=owner, method=method, call=call, when=when, output=output) -> None:
            arm(owner, method, call, when)
            run(model, text, output)

        status = in_child(killed)
        half = output.exists()
        loads = half and loads_somewhere(output)
        # What a run that published leaves behind must not mislead the next one into the same directory.
        shutil.rmtree(output, ignore_errors=True)
        resumed = in_child(lambda output=output: run(model, text, output))
        print(
            json.dumps(
                {
                    "place": f"{when} call {call} of {method}",
                    "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                    "output_after_kill": half,
                    "complete_after_kill": loads,
                    "resumed": resumed == 0,
                }
            ),
            flush=True,
        )


def run(model: Path, text: Path, output: Path) -> None:
    """One whole run."""
    torch.set_num_threads(1)
    recorder = Recorder()
    pipeline.Compression(tiny_options(model, output, text), recorder).run("test")


def arm(owner: object, method: str, call: int, when: str) -> None:
    """Make this process kill itself at the given call."""
    original = getattr(owner, method)
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == call and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method, wrapped)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child and return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def loads_somewhere(output: Path) -> bool:
    """Tell whether what is there is a whole checkpoint."""
    return (output / "config.json").is_file() and bool(Shards(output).entries)


if __name__ == "__main__":
    main()
