import pytest
import torch
from safetensors.torch import save_file

from pifa_vllm.compression.calibration.token_file import read_tokens, write_tokens
from pifa_vllm.errors import CalibrationError


def test_tokens_and_record_come_back(tmp_path):
    tokens = torch.randint(0, 1000, (3, 8))
    write_tokens(tmp_path / "t.safetensors", tokens, {"source": "self", "seed": 4})
    found, record = read_tokens(tmp_path / "t.safetensors", 3, 8)
    assert torch.equal(found, tokens)
    assert record["source"] == "self"
    assert record["seed"] == 4
    assert len(record["tokens_sha256"]) == 64


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(CalibrationError, match=r"t\.safetensors: expected a safetensors file"):
        read_tokens(path, 1, 1)
    path.write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match=r"t\.safetensors: expected a safetensors file"):
        read_tokens(path, 1, 1)
    save_file({"other": torch.zeros(2, 2)}, path)
    with pytest.raises(CalibrationError, match="tokens"):
        read_tokens(path, 2, 2)
    for record in ("{", "3", "[1]"):
        save_file({"tokens": torch.zeros(2, 2, dtype=torch.int64)}, path, metadata={"record": record})
        with pytest.raises(CalibrationError, match="and a record of them"):
            read_tokens(path, 2, 2)
    save_file({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, path)
    with pytest.raises(CalibrationError, match=r"expected int64 \[2, 2\].*found torch\.int64 \[2, 3\]"):
        read_tokens(path, 2, 2)
    save_file({"tokens": torch.tensor([[1, -1]])}, path)
    with pytest.raises(CalibrationError, match="found -1"):
        read_tokens(path, 1, 2)
