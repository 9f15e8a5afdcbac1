"""The op, whichever kernel runs it, against the dense matrices that its factors stand for."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pifa_vllm.factorization import remaining_rows
from pifa_vllm.ops import pifa_linear, stacked_rows
from pifa_vllm.ops.linear import check_arguments
from pifa_vllm.ops.reference import pifa_linear_reference
from pifa_vllm.quantization import GROUP_SIZES
from tests.ops.factors import TOLERANCE, Layer, check


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
    # Ranks 0 and m are among them.
    ranks, out_features = [round(share * m) for m, share in shapes], [m for m, _ in shapes]
    layer = Layer.random(ranks, out_features, n, dtype, with_bias=with_bias, seed=seed)
    x = torch.randn(*leading, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    check(pifa_linear(x, *layer.arguments()), layer.expected(x), dtype)
    check(pifa_linear_reference(x, *layer.arguments()), layer.expected(x), dtype)


INTEGERS = (torch.int8, torch.uint8)
STORED = [*itertools.product(INTEGERS, INTEGERS), (torch.float8_e4m3fn, torch.float8_e4m3fn)]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.floats(0.0, 1.0)), min_size=1, max_size=3),
    n=st.integers(1, 70),
    leading=st.sampled_from([(), (1,), (5,), (40,), (0,), (2, 3)]),
    stored=st.sampled_from(STORED),
    group_size=st.sampled_from([0, *GROUP_SIZES]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_quantized_factors_are_multiplied_as_what_they_stand_for(
    shapes, n, leading, stored, group_size, with_bias, dtype, seed
):
    ranks, out_features = [round(share * m) for m, share in shapes], [m for m, _ in shapes]
    layer = Layer.random(ranks, out_features, n, with_bias=with_bias, seed=seed)
    layer.bias = None if layer.bias is None else layer.bias.to(dtype)
    arguments, stands_for = layer.quantized(*stored, group_size)
    x = torch.randn(*leading, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tolerance = max(TOLERANCE[dtype], 1e-4)
    check(pifa_linear(x, *arguments), stands_for.expected(x), dtype, tolerance)
    check(pifa_linear_reference(x, *arguments), stands_for.expected(x), dtype)


def test_gradients_reach_the_input_of_quantized_factors():
    arguments, stands_for = Layer.random([5], [12], 8, with_bias=True).quantized(torch.int8, torch.uint8, 0)
    x = torch.randn(4, 8, requires_grad=True)
    pifa_linear(x, *arguments).square().sum().backward()
    wanted = torch.autograd.grad(stands_for.expected(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted.float(), rtol=1e-4, atol=1e-4)


def test_stacked_rows_say_where_each_output_goes():
    first, second = torch.tensor([1, 3], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    rows = stacked_rows([first, second], [5, 2])
    assert rows.dtype == torch.int32
    assert rows.tolist() == [1, 3, 5, 0, 2, 4, 6]
    assert stacked_rows([first], [5]).tolist() == [*first.tolist(), *remaining_rows(first, 5).tolist()]


def test_without_rows_the_outputs_stay_in_stacked_order():
    """A dense matrix is a shard that is all pivot rows."""
    weight, x = torch.randn(30, 17), torch.randn(3, 17)
    y = pifa_linear(x, weight, weight.new_empty(0), None, [30], [30])
    torch.testing.assert_close(y, x @ weight.T)


def test_strided_inputs_are_read_as_they_are():
    layer = Layer.random([9], [24], 16)
    wide = torch.randn(7, 40)
    for x in (wide[:, 3:19], wide.T[:16, :7].T, wide[::2, :16]):
        check(pifa_linear(x, *layer.arguments()), layer.expected(x), torch.float32)


def test_gradients_reach_factors_input_and_bias():
    layer = Layer.random([5], [12], 8, with_bias=True)
    pivot_weight, coefficients, rows, ranks, outs, bias = layer.arguments()
    tensors = [t.double().requires_grad_() for t in (torch.randn(4, 8), pivot_weight, coefficients, bias)]
    assert torch.autograd.gradcheck(lambda x, w, c, b: pifa_linear(x, w, c, rows, ranks, outs, b), tensors)


@pytest.mark.parametrize("trained", ["coefficients", "bias"])
def test_gradients_reach_what_alone_is_trained(trained):
    """Of the first layer, say, whose inputs come from a frozen embedding."""
    names = ("pivot_weight", "coefficients", "out_rows", "ranks", "out_features", "bias")
    arguments = dict(zip(names, Layer.random([5], [12], 8, with_bias=True).arguments(), strict=True))
    arguments[trained].requires_grad_()
    pifa_linear(torch.randn(4, 8), **arguments).sum().backward()
    assert float(arguments[trained].grad.norm()) > 0


def test_compiles_as_one_graph_for_every_number_of_tokens():
    layer = Layer.random([9, 8], [24, 8], 16, with_bias=True)
    arguments = layer.arguments()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x: pifa_linear(x, *arguments), backend=counter, fullgraph=True)
    with torch.inference_mode():
        for tokens in (5, 1000, 31, 32, 2):
            x = torch.randn(tokens, 16)
            torch._dynamo.mark_dynamic(x, 0)
            check(compiled(x), layer.expected(x), torch.float32)
    assert counter.frame_count == 1


def test_compiled_training_has_gradients():
    pivot_weight, *rest = Layer.random([5], [12], 8).arguments()
    pivot_weight.requires_grad_()
    x = torch.randn(4, 8)
    torch.compile(pifa_linear, backend="aot_eager")(x, pivot_weight, *rest).sum().backward()
    actual, pivot_weight.grad = pivot_weight.grad, None
    pifa_linear(x, pivot_weight, *rest).sum().backward()
    torch.testing.assert_close(actual, pivot_weight.grad)


@pytest.mark.parametrize("tokens", [0, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_a_well_behaved_op(tokens, dtype):
    arguments = Layer.random([9, 8], [24, 8], 16, dtype, with_bias=True).arguments()
    x = torch.randn(tokens, 16).to(dtype)
    torch.library.opcheck(torch.ops.pifa.linear, (x, *arguments))
    quantized, _ = Layer.random([9, 8], [24, 8], 16).quantized(torch.uint8, torch.int8, 32)
    torch.library.opcheck(torch.ops.pifa.linear, (x, *quantized))


def bad_arguments():
    def change(index, value):
        arguments = Layer.random([5], [12], 8, with_bias=True).arguments()
        arguments[index] = value(arguments[index]) if callable(value) else value
        return arguments

    yield change(0, lambda w: w[:, :7].contiguous()), r"pivot_weight: expected shape \[5, 8\], found \[5, 7\]"
    yield change(0, lambda w: w.bfloat16()), r"pivot_weight: expected .*[fF]loat.*, found .*[bB][fF]loat16"
    yield change(0, lambda w: w.T.contiguous().T), "pivot_weight: expected a contiguous tensor, found strides"
    yield change(1, lambda c: c[1:]), r"coefficients: expected shape \[35\], found \[34\]"
    yield change(2, lambda rows: rows.long()), r"out_rows: expected .*[iI]nt.*, found .*(Long|int64)"
    yield change(2, lambda rows: rows[1:].contiguous()), r"out_rows: expected shape \[12\], found \[11\]"
    yield change(3, [13]), r"ranks\[0\]: expected 0 to 12, found 13"
    yield change(3, [-1]), r"ranks\[0\]: expected 0 to 12, found -1"
    yield change(4, [12, 3]), "expected as many ranks as out_features, found 1 and 2"
    yield change(5, lambda b: b[1:]), r"bias: expected shape \[12\], found \[11\]"
    yield change(5, lambda b: b.to("meta")), "bias: expected on cpu like x, found meta"

    def quantized(index, value):
        arguments, _ = Layer.random([5], [12], 40).quantized(torch.uint8, torch.int8, 32)
        arguments[index] = value(arguments[index]) if callable(value) else value
        return arguments

    yield (
        quantized(0, lambda w: w.short()),
        "pivot_weight: expected int8, uint8 or float8_e4m3fn",
    )
    yield (
        quantized(0, lambda w: w[:, :20].contiguous()),
        r"pivot_weight: expected shape \[5, 32\], found \[5, 20\]",
    )
    yield (
        quantized(1, lambda c: c.to(torch.float8_e4m3fn)),
        "expected float8_e4m3fn of both factors or of none, found",
    )
    yield quantized(1, lambda c: c[1:]), r"coefficients: expected shape \[35\], found \[34\]"
    yield quantized(6, None), "expected scales of both factors or of none, found those of one"
    yield quantized(6, lambda s: s.float()), r"pivot_scale: expected .*(Half|float16), found .*[fF]loat"
    yield (
        quantized(6, lambda s: s[:, :1].contiguous()),
        r"pivot_scale: expected shape \[5, 2\], found \[5, 1\]",
    )
    yield quantized(7, lambda s: s[1:]), r"coefficient_scale: expected shape \[7\], found \[6\]"
    yield quantized(8, 48), "group_size: expected 0, 32, 64, 128 or 256, found 48"


@pytest.mark.parametrize(("arguments", "message"), list(bad_arguments()))
def test_bad_arguments_are_named(arguments, message):
    x = torch.randn(3, 8 if len(arguments) == 6 else 40)
    with pytest.raises(ValueError, match=message):
        check_arguments(x, *arguments)
