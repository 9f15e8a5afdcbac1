import shutil
from pathlib import Path

import pytest

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.errors import CheckpointError
from tests.conftest import Twins
from tests.tiny import save_byte_tokenizer


def test_pifa_and_dense_directories_have_the_same(twins: Twins) -> None:
    assert load_tokenizer(twins.pifa)("çà")["input_ids"] == load_tokenizer(twins.original)("çà")["input_ids"]


def test_none_or_a_damaged_one_is_refused_in_one_paragraph(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_not_laid_to_the_tokenizer(twins: Twins, tmp_path: Path) -> None:
    model = shutil.copytree(twins.pifa, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=shard.name) as caught:
        load_tokenizer(model)
    assert "tokenizer" not in str(caught.value)


def test_code_beside_it_is_not_run(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [null, "theirs.Theirs"]}}'
    )
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not marker.exists()
