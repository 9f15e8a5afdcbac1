"""What of `make gpu-check` runs without a GPU."""

import pytest
import torch

from pifa_vllm.bench import gpu_check, gpu_layers
from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.errors import PifaError


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    with pytest.raises(PifaError, match="expected a GPU"):
        gpu_check.gpu_check(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_values_are_compared(monkeypatch):
    monkeypatch.setattr(gpu_check, "REAL_SHAPES", (((48, 16), (96, 40), 64),))
    shapes = len(gpu_check.ODD_SHAPES) + len(gpu_check.TOLERANCE)
    assert gpu_check.check_values("cpu") == shapes * len(gpu_check.TOKENS_TO_CHECK)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_value_is_named(monkeypatch, wrong):
    right = gpu_check.pifa_linear

    def broken(x, *rest):
        y = right(x, *rest)
        y[-1, -1] += wrong * y.abs().max()
        return y

    monkeypatch.setattr(gpu_check, "pifa_linear", broken)
    with pytest.raises(PifaError, match=r"ranks \(0,\), out_features \(5,\), n 5, 1 tokens"):
        gpu_check.check_values("cpu")


def test_compiled_layers_take_every_token_count_in_one_graph():
    torch._dynamo.reset()
    assert gpu_check.check_compile("cpu") == len(gpu_check.TOKENS_TO_CHECK) - 1


def test_implementations_have_the_layers_shape_and_their_copies():
    layer = LayerShape("qkv_proj", 96, (64, 48))
    made = gpu_layers.forwards(layer, 0.5, torch.float32, "cpu", lambda size: 3 if size < 40_000 else 1)
    assert {name: len(copies) for name, copies in made.items()} == {
        "dense": 1,
        "lowrank": 3,
        "same_rank": 3,
        "reference": 3,
        "pifa": 3,
    }
    x = torch.randn(5, 96)
    for copies in made.values():
        for forward in copies:
            assert forward(x).shape == (5, 112)
            assert forward(x).isfinite().all()


def test_reference_and_ours_agree():
    layer = LayerShape("o_proj", 96, (64,))
    outputs = []
    for make in (gpu_layers._reference, gpu_layers._pifa):
        torch.manual_seed(0)
        _, forward = make(layer, [16], torch.float32, "cpu")
        outputs.append(forward(torch.ones(2, 96)))
    assert torch.allclose(*outputs, atol=1e-5)
