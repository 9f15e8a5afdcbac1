"""Tries attacks and judges how they ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.attacks.isolation import MEMORY, Ending, isolated
from tests.attacks.spoiling import Attack

# An engine that is to load values takes this for itself.
_ENGINE_MEMORY = 16 << 30


@dataclass(frozen=True)
class Trial:
    """An attack on a loader.

    Attributes:
        problems: what is wrong with how it ended; none if the attack was refused as it should be.
    """

    attack: Attack
    loader: str
    ending: Ending
    problems: list[str]


def try_attack(
    attack: Attack, name: str, load: Callable[[Path], None], bases: dict[str, Path], scratch: Path
) -> Trial:
    """Spoil a copy of the attack's base, give it to a loader, and judge."""
    directory = scratch / "checkpoint"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(bases[attack.base], directory)
    attack.spoil(directory)
    ending = isolated(
        lambda: load(directory),
        memory=_ENGINE_MEMORY if name == "vllm" else MEMORY,
        seconds=120 if name == "vllm" else 30,
    )
    for left in scratch.glob("checkpoint-outside-*"):
        left.unlink()
    return Trial(attack, name, ending, _problems(attack, name, ending, directory))


def _problems(attack: Attack, name: str, ending: Ending, directory: Path) -> list[str]:
    found = []
    if ending.outcome != "refused" and not (ending.outcome == "theirs" and name in attack.theirs):
        found.append(f"expected to be refused, {ending.outcome}: {ending.message[:300]}")
    elif ending.outcome == "refused":
        found += [f"does not name {part}" for part in attack.names if part not in ending.message]
        if len(ending.message) > 2000 or not ending.message.isprintable():
            found.append("is no message for a terminal")
    if ending.mebibytes > MEMORY >> 20:
        found.append(f"took {ending.mebibytes:.0f} MiB")
    if (directory / "OWNED").exists():
        found.append("ran the checkpoint's code")
    return found
