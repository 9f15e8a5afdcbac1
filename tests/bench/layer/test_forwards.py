"""What is timed on a layer: that it is what it says, and how often it is made."""

import pytest
import torch

from pifa_vllm.bench.layer.forwards import Implementation, dense, pifa, reference
from pifa_vllm.bench.shapes import LayerShape

FUSED = LayerShape("qkv_proj", 32, (48, 16, 16))


@pytest.mark.parametrize("ranks", [(20, 5, 16), (0, 1, 7)])
def test_the_reference_and_ours_agree(ranks):
    x = torch.randn(3, 32)
    outputs = []
    for make in (pifa, reference):
        torch.manual_seed(0)
        outputs.append(make(FUSED, ranks, torch.float32)(x))
    assert outputs[0].shape == (3, 80)
    torch.testing.assert_close(*outputs)


def test_copies_fill_the_working_set():
    def copies(parameters, working_set):
        item = Implementation("dense", torch.bfloat16, parameters, lambda: dense(FUSED, torch.bfloat16))
        return len(item.copies(working_set))

    assert copies(80 * 32, 3 * 2 * 80 * 32) == 3
    assert copies(80 * 32, 3 * 2 * 80 * 32 + 1) == 4
    assert copies(80 * 32, 1) == 1
    assert copies(0, 1 << 30) == 64
