"""The PIFA linear layer against the dense matrices that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pifa_vllm.factorization import PIFA, output_order
from pifa_vllm.ops import pifa_linear, stacked_order
from pifa_vllm.ops.reference import pifa_linear_reference

# Relative to the largest output; the reference is float64 on the rounded factors.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random_factors(m, n, rank, generator, dtype=torch.float32):
    rows = torch.randperm(m, generator=generator)[:rank].sort().values.to(torch.int32)
    pivot_weight = torch.randn(rank, n, generator=generator) / n**0.5
    coefficients = torch.rand(m - rank, rank, generator=generator) * 2 - 1
    return PIFA(pivot_weight.to(dtype), coefficients.to(dtype), rows)


def arguments(shards):
    return (
        torch.cat([s.pivot_weight for s in shards]),
        [s.coefficients for s in shards],
        stacked_order([s.pivot_rows for s in shards], [s.shape[0] for s in shards]),
    )


def dense(shards, x, bias):
    weight = torch.cat(
        [PIFA(s.pivot_weight.double(), s.coefficients.double(), s.pivot_rows).dense() for s in shards]
    )
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


def check(actual, expected, dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1.0)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 24), st.floats(0.0, 1.0)), min_size=1, max_size=3),
    n=st.integers(1, 20),
    leading=st.sampled_from([(), (1,), (5,), (40,), (0,), (2, 3), (2, 1, 17)]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_equals_the_dense_product(shapes, n, leading, with_bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    # Ranks 0 and m are among them.
    shards = [random_factors(m, n, round(share * m), generator, dtype) for m, share in shapes]
    x = torch.randn(*leading, n, generator=generator).to(dtype)
    outputs = sum(s.shape[0] for s in shards)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    expected = dense(shards, x, bias)
    check(pifa_linear(x, *arguments(shards), bias), expected, dtype)
    check(pifa_linear_reference(x, *arguments(shards), bias), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 31, 32, 200])
def test_either_side_of_the_switch_between_gathers(dtype, tokens):
    generator = torch.Generator().manual_seed(tokens)
    shards = [random_factors(m, 48, r, generator, dtype) for m, r in [(64, 33), (32, 32), (32, 7)]]
    x = torch.randn(tokens, 48, generator=generator).to(dtype)
    y = pifa_linear(x, *arguments(shards))
    assert y.is_contiguous()
    check(y, dense(shards, x, None), dtype)


def test_one_tensor_of_coefficients_is_one_matrix():
    factors = random_factors(24, 16, 10, torch.Generator().manual_seed(0))
    x = torch.randn(3, 16)
    order = output_order(factors.pivot_rows, 24)
    assert torch.equal(stacked_order([factors.pivot_rows], [24]), order)
    check(
        pifa_linear(x, factors.pivot_weight, factors.coefficients, order),
        dense([factors], x, None),
        torch.float32,
    )


def test_gradients_reach_factors_input_and_bias():
    shards = [random_factors(12, 8, 5, torch.Generator().manual_seed(1))]
    pivot_weight, coefficients, order = arguments(shards)
    x, bias = torch.randn(4, 8), torch.zeros(12)
    tensors = [t.double().requires_grad_() for t in (x, pivot_weight, coefficients[0], bias)]
    assert torch.autograd.gradcheck(lambda x, w, c, b: pifa_linear(x, w, c, order, b), tensors)


def test_compiles_as_one_graph_for_every_number_of_tokens():
    shards = [random_factors(m, 16, r, torch.Generator().manual_seed(2)) for m, r in [(24, 9), (8, 8)]]
    pivot_weight, coefficients, order = arguments(shards)
    bias = torch.randn(32)
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x):
        return pifa_linear(x, pivot_weight, coefficients, order, bias)

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.inference_mode():
        for tokens in (5, 1000, 31, 32, 2):
            x = torch.randn(tokens, 16)
            torch._dynamo.mark_dynamic(x, 0)
            check(compiled(x), dense(shards, x, bias), torch.float32)
    assert counter.frame_count == 1


def test_compiled_training_has_gradients():
    shards = [random_factors(12, 8, 5, torch.Generator().manual_seed(3))]
    pivot_weight, coefficients, order = arguments(shards)
    pivot_weight.requires_grad_()
    x = torch.randn(4, 8)
    torch.compile(pifa_linear, backend="aot_eager")(x, pivot_weight, coefficients, order).sum().backward()
    actual, pivot_weight.grad = pivot_weight.grad, None
    pifa_linear(x, pivot_weight, coefficients, order).sum().backward()
    torch.testing.assert_close(actual, pivot_weight.grad)
