"""What a server says of a model's weights, from its files' headers."""

import pytest
import torch

pytest.importorskip("vllm")

from pifa_vllm_server.model import read_weights

from pifa_vllm.checkpoint import FactorFormat, Shards
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model


@pytest.mark.parametrize(
    "kind",
    [
        None,
        FactorFormat(bits=4, coefficient_bits=8, group_size=32),
        FactorFormat(bits=8, coefficient_bits=8, type="float"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_numbers_and_their_scales_are_served_as_they_are(kind, dtype, tmp_path):
    save_tiny_model(tmp_path / "original", "qwen2")
    save_pifa_twin(
        tmp_path / "original",
        tmp_path / "pifa",
        tmp_path / "dense",
        ranks=lambda name, m, n: None if "k_proj" in name else 16,
        kind=kind,
    )
    found, dense = read_weights(tmp_path / "pifa", dtype), read_weights(tmp_path / "dense", dtype)
    assert found.dense_bytes == dense.dense_bytes == dense.compressed_bytes
    entries = Shards(tmp_path / "pifa").entries
    floats = sum(x.nbytes for x in entries.values() if x.dtype == torch.float32)
    rest = sum(x.nbytes for x in entries.values()) - floats
    assert found.compressed_bytes == floats // 4 * dtype.itemsize + rest
    shapes = {module["name"]: (module["shape"], module["rank"]) for module in found.modules}
    assert shapes["model.layers.0.self_attn.k_proj"] == ([32, 64], None)
    assert shapes["model.layers.0.mlp.up_proj"] == ([112, 64], 16)
