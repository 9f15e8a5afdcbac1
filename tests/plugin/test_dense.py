"""Dense layers beside PIFA ones on the CPU: same outputs as vLLM's own, weights left in place."""

import pytest
import torch
from torch.nn import Module, Parameter
from torch.nn.functional import linear

from pifa_vllm.plugin import dense
from pifa_vllm.plugin.dense import StreamedEmbeddingMethod, StreamedLinearMethod

METHODS = (StreamedLinearMethod, StreamedEmbeddingMethod)


def make_layer(dtype):
    layer = Module()
    layer.weight = Parameter(torch.randn(96, 64).to(dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_those_of_the_dense_layer(method, dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dense, "load", lambda: False)
    layer, method = make_layer(dtype), method()
    weight, bias = layer.weight.data.clone(), torch.randn(96).to(dtype)
    # vLLM's own method keeps the bias of a small layer in float32 where the CPU has AMX.
    layer.bias = Parameter(bias.clone(), requires_grad=False)
    method.process_weights_after_loading(layer)
    assert method.streamed == native
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, 64).to(dtype)
        expected = linear(x.float(), weight.float(), bias.float())
        y = method.apply(layer, x, layer.bias)
        assert y.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 0.25
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_is_not_copied(method):
    layer, method = make_layer(torch.float32), method()
    before = layer.weight.data_ptr()
    method.process_weights_after_loading(layer)
    assert layer.weight.data_ptr() == before
