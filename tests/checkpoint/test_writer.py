"""A checkpoint appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pifa_vllm.checkpoint import Checkpoint, CheckpointWriter, Shards, is_pifa, read_json, writer
from pifa_vllm.checkpoint.writer import module_tensors
from pifa_vllm.errors import CheckpointError
from pifa_vllm.factorization import factorize
from tests.checkpoint.sample import SHARDS, Sample


def killed_writer(mode: str, root: Path) -> list[str]:
    command = [sys.executable, "-m", "tests.checkpoint.killed_writer", mode, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_is_published_is_what_was_written(tmp_path: Path) -> None:
    sample = Sample()
    sample.publish(tmp_path / "out", tmp_path / "staging")
    checkpoint = Checkpoint.open(tmp_path / "out")
    checkpoint.verify()
    assert checkpoint.config.model_dump() == sample.section
    for tensors in sample.shards:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.shards.load(name), tensor)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in checkpoint.shards.entries.values())
    assert not (tmp_path / "staging").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        *SHARDS,
        "model.safetensors.index.json",
    ]


def test_the_dense_config_is_kept_but_for_our_section(tmp_path: Path) -> None:
    plain = {"model_type": "llama", "rope_scaling": {"factor": 2.0}}
    config = {**plain, "quantization_config": {"quant_method": "old"}}
    for name, section in (("dense", None), ("pifa", Sample().section)):
        made = CheckpointWriter(tmp_path / name, tmp_path / "staging")
        made.write_shard("model.safetensors", {"a": torch.ones(2)})
        parsed = section and writer.PIFAConfig.parse({**section, "ranks": {}}, "sample")
        made.publish(config, parsed)
        saved = read_json(tmp_path / name / "config.json")
        assert saved.pop("quantization_config", None) == (section and {**section, "ranks": {}})
        assert saved == plain
        assert is_pifa(tmp_path / name) == bool(section)


def test_companions_are_copied_untouched_and_weights_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kept = [
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "merges.txt",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
    ]
    left = [
        "config.json",
        "compression_report.json",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model.safetensors",
        "modeling.py",
        "README.md",
    ]
    for name in kept + left:
        (source / name).write_bytes(name.encode() + b"\r\n\xff")
    (source / "folder.json").mkdir()
    made = CheckpointWriter(tmp_path / "out", tmp_path / "staging")
    made.copy_companions(source)
    assert sorted(path.name for path in made.staging.iterdir()) == sorted(kept)
    for name in kept:
        assert (made.staging / name).read_bytes() == (source / name).read_bytes()


def test_names_of_classes_to_import_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "theirs.T"}, "a": 1}')
    made = CheckpointWriter(tmp_path / "out", tmp_path / "staging")
    made.copy_companions(source)
    made.write_shard("model.safetensors", {"a": torch.ones(2)})
    made.publish({"auto_map": {"AutoConfig": "theirs.C"}, "b": 2}, None)
    assert read_json(tmp_path / "out" / "tokenizer_config.json") == {"a": 1}
    assert read_json(tmp_path / "out" / "config.json") == {"b": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_module_tensors_have_the_names_and_dtypes_of_the_format(dtype: torch.dtype) -> None:
    factors = factorize(torch.randn(6, 2), torch.randn(2, 4))
    tensors = module_tensors("m", factors, torch.ones(6), dtype)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "m.pivot_weight": (dtype, (2, 4)),
        "m.coefficients": (dtype, (4, 2)),
        "m.pivot_rows": (torch.int32, (2,)),
        "m.bias": (dtype, (6,)),
    }
    assert set(module_tensors("m", factors, None, dtype)) == {
        "m.pivot_weight",
        "m.coefficients",
        "m.pivot_rows",
    }


def test_views_are_written_by_themselves(tmp_path: Path) -> None:
    base = torch.arange(100_000, dtype=torch.float32)
    made = CheckpointWriter(tmp_path / "out", tmp_path / "staging")
    made.write_shard("model.safetensors", {"row": base[5:8], "column": base.view(1000, 100)[:3, 7]})
    assert (made.staging / "model.safetensors").stat().st_size < 1000
    shards = Shards(made.staging)
    assert torch.equal(shards.load("row"), base[5:8])
    assert torch.equal(shards.load("column"), torch.tensor([7.0, 107.0, 207.0]))


def test_an_output_that_appeared_meanwhile_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match=r"out: exists by now.*is kept in .*staging"):
        Sample().publish(tmp_path / "out", tmp_path / "staging")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    Checkpoint.open(tmp_path / "staging").verify()


def test_left_over_scratch_files_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / ".model-00009.safetensors.tmp").write_bytes(b"half a shard")
    Sample().publish(tmp_path / "out", tmp_path / "staging")
    assert not list((tmp_path / "out").glob(".*"))


def test_a_full_disk_says_so_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = CheckpointWriter(tmp_path / "out", tmp_path / "staging")

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"staging/a\.safetensors: the disk is full.*run the same command"
    ):
        made.write_shard("a.safetensors", {"a": torch.ones(1)})
    assert not list(made.staging.iterdir())


def test_failed_writes_are_clear_and_leave_no_partial_file(tmp_path: Path) -> None:
    messages = killed_writer("limited", tmp_path)
    assert len(messages) == 3, "each write fails, and nothing is left in the staging directory"
    for message, file in zip(messages, ("big.safetensors", "big.txt", "big.json"), strict=True):
        assert f"staging/{file}: cannot be written" in message
        assert "too large" in message


def test_killed_before_every_single_file_operation(tmp_path: Path) -> None:
    states = killed_writer("steps", tmp_path)
    # Each run goes on where the one before was killed, so a checkpoint only ever gets more complete.
    order = ["nothing", "partial", "complete", "published"]
    assert states == sorted(states, key=order.index)
    assert set(states) == set(order)
    # mkdir; two shards: scratch, half of it, sync, rename; three texts: sync, rename; the directory: the same.
    assert states.index("published") >= 1 + 2 * 4 + 3 * 2 + 2


def test_killed_at_random_moments(tmp_path: Path) -> None:
    states = killed_writer("random", tmp_path)
    assert len(states) == 30
    assert set(states) <= {"nothing", "partial", "complete", "published"}
