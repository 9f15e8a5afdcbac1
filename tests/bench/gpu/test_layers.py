"""What is timed on a GPU, made on a CPU."""

import torch

from pifa_vllm.bench.gpu.layers import implementations
from pifa_vllm.bench.shapes import LayerShape

LAYER = LayerShape("qkv_proj", 96, (64, 48))


def test_implementations_have_the_layers_shape():
    x = torch.randn(5, 96)
    made = implementations(LAYER, 0.5, torch.float32, "cpu")
    assert [item.name for item in made] == ["dense", "lowrank", "same_rank", "reference", "pifa"]
    for item in made:
        y = item.make()(x)
        assert y.shape == (5, 112)
        assert y.isfinite().all()


def test_parameters_are_counted_as_stored():
    counts = {item.name: item.parameters for item in implementations(LAYER, 0.5, torch.float32, "cpu")}
    assert counts["dense"] == 96 * 112
    # Ranks 16, of which PIFA could have more: they are multiples of 16.
    assert counts["lowrank"] == counts["same_rank"] == 16 * (64 + 96) + 16 * (48 + 96)
    assert counts["pifa"] == counts["reference"] == counts["lowrank"] - 2 * 16 * 16
