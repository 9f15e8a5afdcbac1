"""Every attack is refused by every loader, with a message that names what is wrong, and costs little."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.bases import save_bases
from tests.attacks.hostile import ATTACKS, KINDS
from tests.attacks.spoiling import Attack
from tests.attacks.table import summary

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results") / "attacks.json"


def try_attacks(loader: str, directory: Path) -> list[dict[str, Any]]:
    """Try them in a process of its own, which can fork before anything has started threads."""
    output = directory / "attacks.json"
    command = [sys.executable, "-m", "tests.attacks.table", "--loaders", loader, "--output", str(output)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found: list[dict[str, Any]] = json.loads(output.read_text())["attacks"]
    return found


def problems(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['kind']}, {row['attack']}: {row['problems']}" for row in rows if row["problems"]]


@pytest.mark.timeout(1500)  # a busy machine: vLLM is tried for some minutes
@pytest.mark.parametrize("loader", ["verify", "transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_every_attack_is_refused(loader: str, tmp_path: Path) -> None:
    if loader == "vllm":
        pytest.importorskip("vllm")
    rows = try_attacks(loader, tmp_path)
    assert problems(rows) == []
    assert len(rows) == sum(loader not in attack.foreign for attack in ATTACKS)
    assert max(row["mebibytes"] for row in rows) < 1024


def test_there_are_many_and_each_is_one_of_its_own() -> None:
    names = Counter((attack.kind, attack.name) for attack in ATTACKS)
    assert set(names.values()) == {1}
    assert len(ATTACKS) >= 60
    assert all(attack.names for attack in ATTACKS if "verify" not in attack.theirs)
    assert len(KINDS) == len({kind.kind for kind in KINDS})


def test_the_committed_table_is_of_these_attacks_and_shows_no_problem() -> None:
    result = json.loads(RESULTS.read_text())
    rows = result["attacks"]
    assert problems(rows) == []
    for loader in ("verify", "transformers", "vllm"):
        expected = [(a.kind, a.name) for a in ATTACKS if loader not in a.foreign]
        assert [(row["kind"], row["attack"]) for row in rows if row["loader"] == loader] == expected
    assert result["summary"] == summary(rows)


@pytest.mark.parametrize(
    "name",
    [
        "num_hidden_layers 10000000",
        "layers of 5,000 digits",
        "FIFO in place of config.json",
        "name that clears the screen",
    ],
)
def test_the_command_line_says_so_in_one_line(name: str, tmp_path: Path) -> None:
    attack: Attack = next(attack for attack in ATTACKS if attack.name == name)
    directory = save_bases(tmp_path, attack.base)[attack.base]
    attack.spoil(directory)
    done = subprocess.run(
        [sys.executable, "-m", "pifa_vllm", "verify", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {directory}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()
    assert all(part in done.stderr for part in attack.names)
