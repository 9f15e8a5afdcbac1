"""`verify` passes what is whole and stops at the first violation, of whatever kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pifa_vllm.cli import main
from tests.conftest import Twins
from tests.edit import copy_edited

Q = "model.layers.0.self_attn.q_proj"


def test_a_good_checkpoint(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(twins.pifa)]) == 0
    assert capsys.readouterr().out == (
        "OK  headers       12 compressed modules, 44 tensors, 1 shards\n"
        "OK  values        all finite; pivots increasing and in range\n"
        "OK  architecture  LlamaForCausalLM has these tensors, and no others\n"
        "OK  tokenizer     258 tokens\n"
    )


ATTACKS: dict[str, tuple[dict[str, Any], str, int]] = {
    "headers": (
        {"config": lambda c: c["quantization_config"]["ranks"].update({Q: 9})},
        "expected [9, in]",
        0,
    ),
    "values": (
        {"tensors": lambda t: t["model.norm.weight"][:1].fill_(math.inf)},
        "expected finite values",
        1,
    ),
    "rows": (
        {"tensors": lambda t: t[f"{Q}.pivot_rows"][:1].fill_(-5)},
        "expected rows in [0, 64), found -5",
        1,
    ),
    "missing": ({"tensors": lambda t: t.pop("model.norm.weight")}, "model.norm.weight is missing", 0),
    "unexpected": ({"tensors": lambda t: t.update(more=torch.ones(1))}, "tensor more is unexpected", 2),
    "shape": ({"config": lambda c: c.update(intermediate_size=111)}, "LlamaForCausalLM expects", 0),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_violations(twins: Twins, tmp_path: Path, attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    edits, message, passed = ATTACKS[attack]
    directory = copy_edited(twins.pifa, tmp_path / "spoiled", **edits)
    assert main(["verify", str(directory)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {directory}")
    assert message in err
    assert err.count("\n") == 1
    assert out.count("OK ") == passed


def test_a_missing_tokenizer(twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copy_edited(twins.pifa, tmp_path / "spoiled")
    (directory / "tokenizer.json").unlink()
    assert main(["verify", str(directory)]) == 1
    out, err = capsys.readouterr()
    assert "the tokenizer cannot be loaded" in err
    assert out.count("OK ") == 3
