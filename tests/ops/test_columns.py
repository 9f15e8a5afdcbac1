"""Products with pivot columns against the matrix that they stand for."""

import pytest
import torch

from pifa_vllm.factorization import by_columns, factorize
from pifa_vllm.ops import Matrix, column_order, dense, pivot_columns_linear
from pifa_vllm.quantization import round_to_nearest

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def columns(m, n, rank):
    u, v = torch.randn(m, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    return by_columns(factorize(u, v))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [(1,), (2, 5), (123,), (0,)])
@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 3), (123, 64, 45), (5, 5, 5), (9, 4, 0), (1, 1, 1)])
def test_it_is_the_product_with_the_whole_matrix(m, n, rank, tokens, dtype):
    found = columns(m, n, rank)
    x, bias = torch.randn(*tokens, n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    factors = found.to(dtype)
    order = column_order(found.pivot_columns, n)
    y = pivot_columns_linear(
        x.to(dtype), Matrix(factors.pivot_weight), Matrix(factors.coefficients), order, bias.to(dtype)
    )
    wanted = x @ found.dense().T + bias
    assert y.dtype == dtype
    assert y.shape == (*tokens, m)
    if y.numel():
        summands = x.abs() @ found.dense().abs().T + bias.abs()
        assert float(((y - wanted).abs() / summands).max()) <= TOLERANCE[dtype]


def test_the_order_is_pivots_then_the_rest():
    assert column_order(torch.tensor([1, 4], dtype=torch.int32), 6).tolist() == [1, 4, 0, 2, 3, 5]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_dense_matrix_may_be_quantized(dtype):
    found = round_to_nearest(torch.randn(9, 70), dtype, 32)
    x, bias = torch.randn(3, 70), torch.randn(9)
    y = dense(x, Matrix(found.numbers, found.scale, 32), bias)
    torch.testing.assert_close(y, x @ found.values().T + bias, rtol=1e-3, atol=2e-3)
