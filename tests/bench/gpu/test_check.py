"""What of `make gpu-check` runs without a GPU."""

import itertools

import pytest
import torch

from pifa_vllm.bench.gpu import check
from pifa_vllm.bench.shapes import LayerShape
from pifa_vllm.errors import PifaError
from pifa_vllm.ops.triton.configs import Device


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    with pytest.raises(PifaError, match="expected a GPU"):
        check.gpu_check(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_values_are_compared(monkeypatch):
    monkeypatch.setattr(check, "REAL_SHAPES", (((48, 16), (96, 40), 64),))
    shapes = len(check.ODD_SHAPES) + len(check.TOLERANCE)
    assert check.check_values("cpu") == shapes * len(check.TOKENS_TO_CHECK)
    assert not torch.are_deterministic_algorithms_enabled()


def test_quantized_values_are_compared(monkeypatch):
    monkeypatch.setattr(check, "REAL_SHAPES", (((48, 16), (96, 40), 64),))
    shapes = 3 * (len(check.ODD_SHAPES) + 2 * len(check.TOLERANCE))  # the latter with pivot rows and columns
    assert check.check_quantized("cpu") == shapes * len(check.TOKENS_TO_CHECK)


def test_every_plan_is_compared(monkeypatch):
    tiny = LayerShape("tiny", 64, (96, 40))
    monkeypatch.setattr(check, "SHAPES", {"tiny": (tiny,)})
    monkeypatch.setattr(check, "MOST_TOKENS", 2048)
    compared = []
    monkeypatch.setattr(check, "_compare", lambda y, expected, case: compared.append(len(y)))
    # Four plans for few tokens, and at least one for many.
    assert check.check_plans("cpu", Device("sm_90", 132), ["tiny"]) >= 5
    assert max(compared) == 1024
    assert {1, 16, 32, 64} <= set(compared)


def test_a_kernel_that_is_compiled_late_is_named(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", {"tiny": (LayerShape("tiny", 16, (16,)),)})
    monkeypatch.setattr(check, "MOST_TOKENS", 64)
    monkeypatch.setattr(check, "_variants", itertools.count(3).__next__)
    with pytest.raises(PifaError, match="compiled after"):
        check.check_plans("cpu", Device("sm_90", 132), ["tiny"])


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_value_is_named(monkeypatch, wrong):
    right = check.pifa_linear

    def broken(x, *rest):
        y = right(x, *rest)
        y[-1, -1] += wrong * y.abs().max()
        return y

    monkeypatch.setattr(check, "pifa_linear", broken)
    with pytest.raises(PifaError, match=r"ranks \(0,\), out_features \(5,\), n 5, 1 tokens"):
        check.check_values("cpu")


def test_compiled_layers_take_every_token_count_in_one_graph():
    torch._dynamo.reset()
    assert check.check_compile("cpu") == len(check.TOKENS_TO_CHECK) - 1
