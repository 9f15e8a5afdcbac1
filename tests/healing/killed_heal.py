"""Healing in children of this process that kill themselves: `killed_heal.py DENSE PIFA TEXT DIRECTORY`.

For every place where a run changes the disk, a child is killed there; a second one runs the same thing again and
must finish with the tensors of a run that nobody killed. Prints one JSON line per place.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from pifa_vllm.checkpoint import CheckpointWriter, Shards
from pifa_vllm.healing.run import Healing
from pifa_vllm.healing.state import StateFiles
from tests.compression.killed_runs import arm, in_child
from tests.healing.tiny_heal import Family, tiny_heal

PLACES = [
    (StateFiles, "save_best", 1, "after"),
    (StateFiles, "save", 1, "before"),
    (StateFiles, "save", 1, "after"),
    (StateFiles, "save_best", 3, "after"),
    (StateFiles, "save", 4, "after"),
    (CheckpointWriter, "write_shard", 1, "after"),
    (CheckpointWriter, "publish", 1, "before"),
    (CheckpointWriter, "publish", 1, "after"),
]


def main() -> None:
    """Kill and resume at every place."""
    dense, pifa, text, directory = map(Path, sys.argv[1:5])
    family = Family(dense, pifa, text)

    def run(output: Path) -> None:
        torch.set_num_threads(1)
        Healing(tiny_heal(family, output, tokens=20 * 2 * 48, every=5), lambda line: None).run("test")

    whole = directory / "whole"
    if in_child(lambda: run(whole)) != 0:
        raise RuntimeError("the run that nobody kills has failed")
    for index, place in enumerate(PLACES):
        output = directory / f"out-{index}"

        def killed(output: Path = output, place: tuple[object, str, int, str] = place) -> None:
            arm(*place)
            run(output)

        status = in_child(killed)
        half = output.exists()
        complete = half and equal(output, whole)
        if half:
            shutil.rmtree(output)
        resumed = in_child(lambda output=output: run(output))
        found = {
            "place": f"{place[3]} call {place[2]} of {place[1]}",
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "output_after_kill": half,
            "complete_after_kill": complete,
            "resumed": resumed == 0 and equal(output, whole),
            "tidy": not output.with_name(output.name + ".partial").exists(),
        }
        print(json.dumps(found), flush=True)


def equal(one: Path, other: Path) -> bool:
    """Tell whether two checkpoints hold the very same tensors."""
    ours, theirs = Shards(one), Shards(other)
    return ours.entries.keys() == theirs.entries.keys() and all(
        torch.equal(ours.load(name), theirs.load(name)) for name in ours.entries
    )


if __name__ == "__main__":
    main()
