"""A tiny dense model, a crude compression of it, and text: what the tests here heal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from pifa_vllm.healing.options import HealOptions
from tests.compression.runs import write_text
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model


class Family(NamedTuple):
    """Directories and a text file."""

    dense: Path
    pifa: Path
    text: Path


def make_family(root: Path, architecture: str = "llama", **overrides: object) -> Family:
    """Save a model, and its halves with k_proj dense."""
    save_tiny_model(root / "dense", architecture, **overrides)
    save_pifa_twin(
        root / "dense",
        root / "pifa",
        root / "twin",
        ranks=lambda name, m, n: None if name.endswith("k_proj") else min(m, n) // 2,
    )
    return Family(root / "dense", root / "pifa", write_text(root / "text.txt", 3000))


def tiny_heal(family: Family, output: Path, **overrides: object) -> HealOptions:
    """Options of a run of 40 steps, 10 to each look."""
    options = HealOptions(
        model=family.pifa,
        output=output,
        teacher=family.dense,
        tokens=40 * 2 * 48,
        calibration=str(family.text),
        length=48,
        batch=2,
        lr=5e-4,
        every=10,
    )
    return dataclasses.replace(options, **overrides)
