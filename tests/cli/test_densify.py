"""`densify` writes the very weights that the checkpoint stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pifa_vllm.checkpoint import Shards, read_json
from pifa_vllm.cli import main
from tests.conftest import Twins
from tests.edit import copy_edited


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_weights_come_back(
    twins: Twins, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_edited(
        twins.pifa,
        tmp_path / "pifa",
        tensors=lambda t: t.update({n: v.to(dtype) for n, v in t.items() if v.is_floating_point()}),
    )
    assert main(["densify", str(source), str(tmp_path / "dense")]) == 0
    assert "dense model of" in capsys.readouterr().out
    if dtype == torch.float32:
        found, expected = Shards(tmp_path / "dense"), Shards(twins.dense)
        assert found.entries.keys() == expected.entries.keys()
        for name in expected.entries:
            assert torch.equal(found.load(name), expected.load(name))
    assert "quantization_config" not in read_json(tmp_path / "dense" / "config.json")
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    compressed = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    weight = compressed.model.layers[0].self_attn.q_proj.dense().weight
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


def test_existing_output(twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense").mkdir()
    assert main(["densify", str(twins.pifa), str(tmp_path / "dense")]) == 1
    assert "dense: exists; expected a directory to create" in capsys.readouterr().err
    assert not list((tmp_path / "dense").iterdir())
