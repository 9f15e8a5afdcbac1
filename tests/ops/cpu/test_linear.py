"""The native CPU kernel against float64: every width of its tiles, odd shapes, poisoned memory."""

import pytest
import torch

from pifa_vllm.ops import pifa_linear
from pifa_vllm.ops.cpu import load
from tests.ops.factors import ODD_SHAPES, Layer, check
from tests.ops.test_linear import bad_arguments

DTYPES = (torch.float32, torch.bfloat16)
# One of each width of dot products, of vectors of tokens, of panels, and around the blocks of 256 and 512 tokens.
TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 123, 257, 513)


@pytest.fixture(autouse=True)
def native():
    # The test environment has a compiler; without the kernel these tests would test the reference.
    assert load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "out_features", "n"), ODD_SHAPES)
def test_odd_shapes(ranks, out_features, n, dtype):
    for tokens in (1, 4, 5, 123):
        layer = Layer.random(ranks, out_features, n, dtype, with_bias=tokens != 4, seed=tokens)
        x = torch.randn(tokens, n).to(dtype)
        check(pifa_linear(x, *layer.arguments()), layer.expected(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_number_of_tokens(tokens, dtype):
    layer = Layer.random([170, 0, 33], [400, 7, 33], 300, dtype, with_bias=True)
    x = torch.randn(tokens, 300).to(dtype)
    check(pifa_linear(x, *layer.arguments()), layer.expected(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 8, 11, 40])
def test_rows_and_features_beyond_one_block(tokens, dtype):
    layer = Layer.random([530, 601], [1111, 640], 1237, dtype, with_bias=True)
    x = torch.randn(tokens, 1237).to(dtype)
    check(pifa_linear(x, *layer.arguments()), layer.expected(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "m", "n"), [(3, 20, 1411), (1301, 1311, 1411), (640, 648, 640), (1280, 1283, 1280)]
)
def test_one_token_and_rows_around_the_length_that_counts_as_short(rank, m, n, dtype):
    layer = Layer.random([rank], [m], n, dtype)
    x = torch.randn(1, n).to(dtype)
    check(pifa_linear(x, *layer.arguments()), layer.expected(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 5, 16, 40])
def test_no_output_and_no_scratch_is_left_unwritten(tokens, dtype):
    """With deterministic algorithms on, torch fills what it hands out with NaN."""
    layer = Layer.random([50, 5], [123, 5], 77, dtype)
    x = torch.randn(tokens, 77).to(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        y = pifa_linear(x, *layer.arguments())
    finally:
        torch.use_deterministic_algorithms(False)
    check(y, layer.expected(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 6, 20])
def test_nan_and_infinity_stay_with_their_token(tokens, dtype):
    layer = Layer.random([50], [123], 77, dtype)
    x = torch.randn(tokens, 77).to(dtype)
    clean = pifa_linear(x, *layer.arguments())
    x[1, 5] = float("nan")
    y = pifa_linear(x, *layer.arguments())
    assert y[1].isnan().all()
    others = [t for t in range(tokens) if t != 1]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("tokens", [3, 7, 16, 50])
def test_the_number_of_threads_does_not_change_the_result(tokens, threads, dtype):
    layer = Layer.random([50, 31], [123, 64], 77, dtype)
    x = torch.randn(tokens, 77).to(dtype)
    before = torch.get_num_threads()
    expected = pifa_linear(x, *layer.arguments())
    try:
        torch.set_num_threads(threads)
        assert torch.equal(pifa_linear(x, *layer.arguments()), expected)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_outputs_are_rounded_to_nearest_even():
    x = torch.tensor([[1.0, 2**-8, 2**-9]]).bfloat16()
    weight = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 3, 0]]).bfloat16()
    y = pifa_linear(x, weight, weight.new_empty(0), None, [4], [4])
    assert torch.equal(y, (x.float() @ weight.float().T).bfloat16())


@pytest.mark.parametrize(("arguments", "message"), list(bad_arguments()))
def test_bad_arguments_are_named(arguments, message):
    if "meta" in message:
        pytest.skip("torch refuses mixed devices before the kernel is reached")
    with pytest.raises(ValueError, match=message):
        torch.ops.pifa.linear(torch.randn(3, 8 if len(arguments) == 6 else 40), *arguments)


@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_low_rank(tokens, dtype):
    x, v, u = torch.randn(tokens, 37).to(dtype), torch.randn(9, 37).to(dtype), torch.randn(23, 9).to(dtype)
    check(
        torch.ops.pifa.lowrank(x, v / 6, u / 3), x.double() @ (v / 6).double().T @ (u / 3).double().T, dtype
    )
