import pytest

from pifa_vllm.bench.shapes import SHAPES

# Parameters of all linear layers of one decoder block: of the whole model less embeddings, over its layers.
BLOCK = {
    "llama2-7b": 202_375_168,
    "llama2-13b": 317_194_240,
    "llama2-70b": 855_638_016,
    "llama3-8b": 218_103_808,
}


@pytest.mark.parametrize("model", SHAPES)
def test_a_block_has_the_models_parameters(model):
    assert sum(layer.m * layer.n for layer in SHAPES[model]) == BLOCK[model]


def test_layers_are_those_that_vllm_fuses():
    for layers in SHAPES.values():
        assert [layer.name for layer in layers] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        assert [len(layer.out_features) for layer in layers] == [3, 1, 2, 1]
