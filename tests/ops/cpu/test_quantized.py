"""The native CPU kernel on quantized factors, against float64 on what they stand for."""

import pytest
import torch

from pifa_vllm.ops import pifa_linear
from pifa_vllm.ops.cpu import load
from tests.ops.factors import ODD_SHAPES, TOLERANCE, Layer, check

BITS = ((torch.int8, torch.int8), (torch.uint8, torch.uint8), (torch.uint8, torch.int8))
# Of activations as 16-bit numbers.
ROUNDING = 1e-4


@pytest.fixture(autouse=True)
def native():
    assert load()


def compare(layer, x, stored, group_size):
    arguments, stands_for = layer.quantized(*stored, group_size)
    tolerance = max(TOLERANCE[x.dtype], ROUNDING)
    check(pifa_linear(x, *arguments), stands_for.expected(x), x.dtype, tolerance)


@pytest.mark.parametrize("stored", BITS)
@pytest.mark.parametrize(("ranks", "out_features", "n"), ODD_SHAPES)
def test_odd_shapes(ranks, out_features, n, stored):
    for tokens, group_size in ((1, 0), (3, 32), (5, 128), (40, 64)):
        layer = Layer.random(ranks, out_features, n, with_bias=tokens != 3, seed=tokens)
        compare(layer, torch.randn(tokens, n), stored, group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [0, 32, 64, 128, 256])
@pytest.mark.parametrize("stored", BITS)
def test_every_number_of_tokens_and_size_of_groups(stored, group_size, dtype):
    for tokens in (1, 2, 3, 4, 9, 17, 300):
        layer = Layer.random([270, 0, 33], [400, 7, 33], 600)
        compare(layer, torch.randn(tokens, 600).to(dtype), stored, group_size)


@pytest.mark.parametrize("tokens", [1, 4, 6, 40])
@pytest.mark.parametrize("stored", BITS)
def test_the_largest_numbers_do_not_overflow(stored, tokens):
    """Every product has the same sign, over many times the features that share a scale."""
    n = 4096
    ones = Layer.random([3], [9], n)
    for shard in ones.shards:
        shard.pivot_weight.fill_(-1.0)
        shard.coefficients.fill_(1.0)
    for x in (torch.full((tokens, n), 3e4), torch.full((tokens, n), -3e4)):
        compare(ones, x, stored, 0)


@pytest.mark.parametrize("tokens", [2, 6, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(tokens, value):
    arguments, _ = Layer.random([50], [123], 77).quantized(torch.int8, torch.int8, 32)
    x = torch.randn(tokens, 77)
    clean = pifa_linear(x, *arguments)
    x[1, 5] = value
    y = pifa_linear(x, *arguments)
    assert not y[1].isfinite().any()
    others = [t for t in range(tokens) if t != 1]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("tokens", [1, 3, 5, 16, 40])
@pytest.mark.parametrize("stored", BITS)
def test_no_output_and_no_scratch_is_left_unwritten(tokens, stored):
    """With deterministic algorithms on, torch fills what it hands out with NaN."""
    layer = Layer.random([50, 5], [123, 5], 77)
    torch.use_deterministic_algorithms(True)
    try:
        compare(layer, torch.randn(tokens, 77), stored, 32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens", [1, 3, 7, 50])
def test_the_number_of_threads_does_not_change_the_result(tokens):
    arguments, _ = Layer.random([50, 31], [123, 64], 77).quantized(torch.uint8, torch.int8, 32)
    x = torch.randn(tokens, 77)
    before, expected = torch.get_num_threads(), pifa_linear(x, *arguments)
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(pifa_linear(x, *arguments), expected)
    finally:
        torch.set_num_threads(before)


def test_zeros_and_tiny_activations_give_zeros():
    arguments, _ = Layer.random([50], [123], 300).quantized(torch.int8, torch.int8, 0)
    for tokens in (1, 20):
        for size in (0.0, 1e-37):
            assert not pifa_linear(torch.full((tokens, 300), size), *arguments).abs().max() > 1e-35
