"""The Triton kernels in Triton's interpreter, against float64; `test_interpreted.py` runs this file.

It needs TRITON_INTERPRET=1 from the start of the process: Triton reads it when it defines its own functions.
"""

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pifa_vllm.ops.reference import pifa_linear_reference
from pifa_vllm.ops.triton.configs import DecodePlan, PrefillPlan, PrefillTile, QuantizedPlan, Tile
from pifa_vllm.ops.triton.decode import decode
from pifa_vllm.ops.triton.prefill import prefill
from pifa_vllm.ops.triton.quantized import quantized
from pifa_vllm.quantization import round_to_nearest

# Relative to the largest output; the reference is float64 on the rounded factors, y_p is rounded in between.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# (ranks, out_features, n)
ONE = [((r,), (m,), n) for m, n in itertools.product((1, 5, 123), repeat=2) for r in (0, 1, 5, 123) if r <= m]
SEVERAL = [
    ((5, 0, 123), (5, 1, 130), 123),
    ((1, 1, 1), (1, 1, 2), 5),
    ((0, 0), (3, 5), 5),
    ((32, 17), (123, 64), 64),
    ((0, 5, 0, 16), (40, 5, 7, 80), 40),
]
TOKENS = (1, 5, 123)


def arguments(tokens, n, ranks, out_features, with_bias, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x = random(tokens, n).to(dtype)
    pivot_weight = (random(sum(ranks), n) / n**0.5).to(dtype)
    shards = [random(m - r, r).clamp(-1, 1).to(dtype) for r, m in zip(ranks, out_features, strict=True)]
    out_rows = torch.randperm(sum(out_features), generator=generator).to(torch.int32)
    bias = random(sum(out_features)).to(dtype) if with_bias else None
    return x, pivot_weight, torch.cat([c.flatten() for c in shards]), out_rows, ranks, out_features, bias


def expected(x, pivot_weight, coefficients, out_rows, ranks, out_features, bias):
    y_p = x.double() @ pivot_weight.double().T
    parts, at = [y_p], 0
    for pivots, r, m in zip(y_p.split(list(ranks), dim=1), ranks, out_features, strict=True):
        size = (m - r) * r
        parts.append(pivots @ coefficients[at : at + size].double().view(m - r, r).T)
        at += size
    y = torch.empty(x.shape[0], sum(out_features), dtype=torch.float64)
    y[:, out_rows.long()] = torch.cat(parts, dim=1)
    return y if bias is None else y + bias.double()


def check(y, args):
    reference = expected(*args)
    assert y.dtype == args[0].dtype
    assert y.shape == reference.shape
    error = (y.double() - reference).abs().max()
    assert error <= TOLERANCE[y.dtype] * reference.abs().max().clamp(min=1.0)


@pytest.fixture(autouse=True)
def _poison():
    """Fill what the kernels allocate with NaN: what is not written shows, and so does a mask that is missing."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _dot(monkeypatch):
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 numbers as integers in `tl.dot`."""
    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )


def run(kernels, args, plan):
    x, *factors, ranks, out_features, bias = args
    return kernels(plan, x.shape[1], ranks, out_features)(x, *factors, bias)


def run_quantized(args, plan):
    x, numbers, rest, out_rows, ranks, out_features, bias, *scales, group = args
    in_order = out_rows is None
    layer = quantized(
        plan, x.shape[1], ranks, out_features, (numbers.dtype, rest.dtype), group, in_order=in_order
    )
    return layer(x, numbers, rest, out_rows, bias, *scales)


def decode_plan(tokens, splits=1, rows=32, k=64):
    bucket = next(b for b in (1, 16, 32, 64, 128) if tokens <= b)
    return DecodePlan(bucket, splits, Tile(rows, k, 4, 3), Tile(rows, k, 4, 3))


def prefill_plan(tokens, splits=1):
    size = 16 if tokens < 16 else 64
    return PrefillPlan(PrefillTile(size, 64, 64, 4, 2, 1.0), PrefillTile(2 * size, 32, 32, 4, 2, 1.0), splits)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("ranks", "out_features", "n"), ONE + SEVERAL)
def test_decode(tokens, ranks, out_features, n):
    for with_bias, splits in ((True, 1), (False, 2)):
        args = arguments(tokens, n, ranks, out_features, with_bias, torch.float32)
        check(run(decode, args, decode_plan(tokens, splits)), args)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("ranks", "out_features", "n"), ONE + SEVERAL)
def test_prefill(tokens, ranks, out_features, n):
    for with_bias, splits in ((True, 1), (False, 2)):
        args = arguments(tokens, n, ranks, out_features, with_bias, torch.float32)
        check(run(prefill, args, prefill_plan(tokens, splits)), args)


def test_prefill_walks_every_tile_of_many_tokens():
    args = arguments(300, 20, (5, 3), (40, 21), True, torch.float32)
    small = PrefillTile(16, 16, 16, 4, 2, 1.0)
    for splits in (1, 2):
        check(run(prefill, args, PrefillPlan(small, small, splits)), args)


@pytest.mark.parametrize("kernels", [decode, prefill])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_16_bit(kernels, dtype, tokens):
    for splits in (1, 4):
        args = arguments(tokens, 123, (32, 17), (123, 64), True, dtype)
        plan = (prefill_plan if kernels is prefill else decode_plan)(tokens, splits)
        check(run(kernels, args, plan), args)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_splits_beyond_the_inputs_add_nothing(splits):
    for tokens in (1, 3):
        args = arguments(tokens, 70, (5, 20), (50, 60), True, torch.float32)
        check(run(decode, args, decode_plan(tokens, splits)), args)
        check(run(prefill, args, prefill_plan(tokens, splits)), args)


def test_every_output_has_its_own_place():
    # Coefficients that are one row of the unit matrix each make every output a copy of one pivot output.
    ranks, out_features, n = (3, 2), (5, 6), 5
    args = list(arguments(2, n, ranks, out_features, False, torch.float32))
    args[1] = torch.eye(5)
    picks = [(0, 1), (1, 0, 1, 0)]
    args[2] = torch.cat([torch.eye(r)[list(p)].flatten() for r, p in zip(ranks, picks, strict=True)])
    stacked = torch.cat([args[0], args[0][:, [0, 1]], args[0][:, [4, 3, 4, 3]]], dim=1)
    for y in (run(decode, args, decode_plan(2)), run(prefill, args, prefill_plan(2))):
        assert torch.equal(y[:, args[3].long()], stacked)


# (dtype of the pivot rows, of the coefficients, numbers that share a scale)
KINDS = [
    (torch.int8, torch.int8, 0),
    (torch.int8, torch.int8, 64),
    (torch.uint8, torch.int8, 32),
    (torch.uint8, torch.uint8, 0),
    (torch.uint8, torch.uint8, 256),
    (torch.float8_e4m3fn, torch.float8_e4m3fn, 0),
    (torch.float8_e4m3fn, torch.float8_e4m3fn, 128),
]


def quantized_arguments(kind, *shape):
    """Arguments of `quantized`, and float64 outputs of what the quantized factors stand for."""
    of_pivots, of_rest, group = kind
    x, pivot_weight, coefficients, out_rows, ranks, out_features, bias = arguments(*shape)
    sizes = [(m - r) * r for r, m in zip(ranks, out_features, strict=True)]
    matrices = [
        c.view(m - r, r) for c, r, m in zip(coefficients.split(sizes), ranks, out_features, strict=True)
    ]
    pivots = round_to_nearest(pivot_weight.float(), of_pivots, group)
    rest = [round_to_nearest(matrix.float(), of_rest, group) for matrix in matrices]
    numbers, scales = (torch.cat([getattr(c, part).flatten() for c in rest]) for part in ("numbers", "scale"))
    values = torch.cat([c.values().flatten() for c in rest])
    factors = (pivots.values().double(), values.double(), out_rows, ranks, out_features)
    wanted = pifa_linear_reference(x.double(), *factors, None if bias is None else bias.double())
    found = (x, pivots.numbers, numbers, out_rows, ranks, out_features, bias, pivots.scale, scales, group)
    return found, wanted


def quantized_plan(tokens, splits=1, rows=32, k=128):
    tile = Tile(rows, k, 4, 2)
    return QuantizedPlan(1 if tokens == 1 else 16 if tokens <= 16 else 64, tile, tile, splits)


def check_quantized(y, wanted, dtype):
    assert y.dtype == dtype
    assert y.shape == wanted.shape
    error = (y.double() - wanted).abs().max() if y.numel() else torch.zeros(())
    assert error <= TOLERANCE[dtype] * max(float(wanted.abs().max()), 1.0)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_factors(kind, tokens):
    for ranks, out_features, n in [ONE[-1], *SEVERAL] if tokens < 123 else SEVERAL[2:4]:
        for with_bias, splits in ((True, 1), (False, 2)):
            args, wanted = quantized_arguments(kind, tokens, n, ranks, out_features, with_bias, torch.float32)
            check_quantized(run_quantized(args, quantized_plan(tokens, splits)), wanted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_factors_of_16_bit_activations(kind, tokens, dtype):
    for splits in (1, 4):
        args, wanted = quantized_arguments(kind, tokens, 300, (32, 17), (123, 64), True, dtype)
        check_quantized(run_quantized(args, quantized_plan(tokens, splits)), wanted, dtype)


@pytest.mark.parametrize("k", [32, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_longer_and_shorter_than_a_tile(kind, k):
    for tokens in (1, 5):
        args, wanted = quantized_arguments(kind, tokens, 600, (40,), (90,), True, torch.float32)
        check_quantized(run_quantized(args, quantized_plan(tokens, 1, 16, k)), wanted, torch.float32)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_quantized_matrix_comes_out_in_order(kind, tokens):
    for m, n in ((1, 1), (5, 123), (123, 40)):
        args, _ = quantized_arguments(kind, tokens, n, (m,), (m,), True, torch.float32)
        args = (*args[:3], None, *args[4:])
        wanted = pifa_linear_reference(*args)
        # Two splits are for where the pivot rows have columns of their own; here the plan's are not taken.
        check_quantized(run_quantized(args, quantized_plan(tokens, 2)), wanted.double(), torch.float32)


def test_every_8_bit_float_is_read_as_it_is():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[torch.isfinite(numbers.float())]
    args = (
        torch.ones(1, 1), numbers[:, None], numbers[:0], None, (len(numbers),), (len(numbers),), None,
        torch.ones(len(numbers), 1).half(), torch.ones(0).half(), 0,
    )  # fmt: skip
    assert torch.equal(run_quantized(args, quantized_plan(1))[0], numbers.float())
