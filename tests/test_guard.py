"""Configs of PIFA checkpoints are checked where transformers reads them; those of other models are not touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from pifa_vllm.errors import CheckpointError
from pifa_vllm.guard import guard_configs
from tests.conftest import Twins

TEN_MILLION = {"num_hidden_layers": 10_000_000}


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def copy(twins: Twins, tmp_path: Path) -> Path:
    return shutil.copytree(twins.pifa, tmp_path / "copy")


def test_guarding_twice_changes_nothing() -> None:
    once = PreTrainedConfig.get_config_dict.__func__
    guard_configs()
    assert PreTrainedConfig.get_config_dict.__func__ is once


def test_a_lie_is_refused_wherever_the_config_is_read(copy: Path, tmp_path: Path) -> None:
    edit(copy, **TEN_MILLION)
    shutil.copytree(copy, tmp_path / "above" / "sub")
    for read, directory, options in (
        (AutoConfig.from_pretrained, copy, {}),
        (AutoConfig.from_pretrained, str(copy), {}),
        (AutoConfig.from_pretrained, tmp_path / "above", {"subfolder": "sub"}),
        (AutoModelForCausalLM.from_pretrained, copy, {}),
        (AutoModelForCausalLM.from_pretrained, copy, {"trust_remote_code": True}),
    ):
        with pytest.raises(
            CheckpointError, match="num_hidden_layers: expected a number from 1 to 1024, found 10000000"
        ):
            read(directory, **options)


def test_other_models_are_not_looked_at(twins: Twins, tmp_path: Path) -> None:
    directory = shutil.copytree(twins.dense, tmp_path / "dense")
    edit(directory, auto_map={"AutoModel": "theirs.M"}, max_position_embeddings=2**30, model="pifa")
    (directory / "theirs.py").write_text("")
    assert AutoConfig.from_pretrained(directory).max_position_embeddings == 2**30
    AutoModelForCausalLM.from_pretrained(directory)


def test_code_is_not_run_even_if_it_is_trusted(copy: Path) -> None:
    edit(copy, auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})
    (copy / "theirs.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="auto_map: expected none in a PIFA checkpoint"):
        AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)


def test_config_and_tokenizer_may_lie_alone(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    assert AutoConfig.from_pretrained(copy).num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(copy)) == 258
    edit(copy, **TEN_MILLION)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        AutoConfig.from_pretrained(copy)


def test_a_config_that_cannot_be_read_is_named(copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text() + "}")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        AutoConfig.from_pretrained(copy)
    path.write_text("{" + " " * (2 << 20) + '"quant_method": "pifa"}')
    with pytest.raises(CheckpointError, match=r"config\.json: expected at most 1048576 bytes"):
        AutoConfig.from_pretrained(copy)
