import errno
import os

import pytest
import torch

from pifa_vllm.compression.flows import Flows, FlowShape, map_activations
from pifa_vllm.errors import CheckpointError

SHAPE = FlowShape(samples=3, length=5, features=7, dtype=torch.bfloat16)


def test_states_survive_as_files(tmp_path):
    flows = Flows(tmp_path / "flows", SHAPE)
    dense, compressed = flows.entering(4)
    dense.fill_(1.5)
    compressed.copy_(torch.arange(7.0).expand(3, 5, 7))
    flows.commit(4)
    assert flows.complete(4)
    del dense, compressed
    dense, compressed = Flows(tmp_path / "flows", SHAPE).entering(4)
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense, torch.full((3, 5, 7), 1.5, dtype=torch.bfloat16))
    assert torch.equal(compressed[2, 4], torch.arange(7.0).bfloat16())
    flows.discard(4)
    assert not flows.complete(4)
    flows.discard(4)


def test_incomplete_files_are_not_complete(tmp_path):
    flows = Flows(tmp_path, SHAPE)
    flows.entering(0)
    assert flows.complete(0)
    os.truncate(tmp_path / "dense-00000.bin", SHAPE.nbytes - 1)
    assert not flows.complete(0)


def test_a_full_disk_is_an_error_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        map_activations(tmp_path / "x.bin", SHAPE)
    assert not (tmp_path / "x.bin").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/flows: cannot be written"):
        Flows(tmp_path / "file" / "flows", SHAPE)


def test_states_that_do_not_reach_the_disk_are_an_error(tmp_path, monkeypatch):
    flows = Flows(tmp_path, SHAPE)
    flows.entering(1)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"dense-00001\.bin: the disk is full"):
        flows.commit(1)
