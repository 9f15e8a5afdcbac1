"""Changed config.json, index and header: refused, or as harmless as the definition in `fuzz` has it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.mutations import mutate

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results") / "fuzz.json"


def run_fuzzer(inputs: int, output: Path, *, before: str = "", timeout: float = 500) -> dict[str, Any]:
    """Fuzz in a process of its own, which can fork; `before` is code that runs first."""
    script = f"{before}\nfrom tests.attacks.fuzz import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--inputs", str(inputs), "--seed", "1", "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_500_inputs(tmp_path: Path) -> None:
    found = run_fuzzer(500, tmp_path / "fuzz.json")
    assert found["findings"] == []
    assert sum(found["outcomes"].values()) == 500


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_10_000_inputs(tmp_path: Path) -> None:
    found = run_fuzzer(10_000, tmp_path / "fuzz.json", timeout=3500)
    assert found["findings"] == []
    assert sum(found["outcomes"].values()) == 10_000


# In the processes that try inputs only: the originals are read before.
BREAK = """
import os, time, types
from tests.attacks import fuzz
from pifa_vllm.checkpoint import files, validate

files.json = types.SimpleNamespace(loads=files.json.loads)
fuzz._BATCH, fuzz._SECONDS = 1, 3
once = fuzz.Fuzzer._try
breaks = [os.abort, lambda: time.sleep(60), lambda: 1 / 0, lambda: bytearray(1 << 40)]


def attempt(self, number, scratch):
    if number < len(breaks):
        files.json.loads = lambda *_, **__: breaks[number]()
    else:
        validate.check_sizes = lambda *_: None
    return once(self, number, scratch)


fuzz.Fuzzer._try = attempt
"""


def test_the_fuzzer_finds_what_is_broken(tmp_path: Path) -> None:
    found = run_fuzzer(150, tmp_path / "fuzz.json", before=BREAK)
    whats = [one["what"] for one in found["findings"]]
    for number, part in enumerate(("status 6", "status 14|hung", "ZeroDivisionError", "MemoryError")):
        assert found["findings"][number]["number"] == number
        assert re.search(part, whats[number])
    assert any("another meaning: sizes" in what for what in whats)


def test_inputs_follow_from_their_seed() -> None:
    content = json.dumps({"a": [1, 2.5, {"b": "c"}], "d": None}).encode()
    made = [mutate(content, random.Random(seed)) for seed in range(300)]
    assert made == [mutate(content, random.Random(seed)) for seed in range(300)]
    assert len(set(made)) > 200
    assert mutate(b"", random.Random(1)) == mutate(b"", random.Random(1))


def test_the_committed_run_had_10_000_inputs_and_no_findings() -> None:
    result = json.loads(RESULTS.read_text())
    assert result["inputs"] == sum(result["outcomes"].values()) == 10_000
    assert result["findings"] == []
    for target in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        assert result["outcomes"][f"{target}: accepted"] > 0
        assert result["outcomes"][f"{target}: refused"] > 1000
