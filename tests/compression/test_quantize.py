"""Rounding with feedback beats rounding to nearest in the metric that it is told."""

import pytest
import torch

from pifa_vllm.compression.lowrank import regularised
from pifa_vllm.compression.options import FACTORS
from pifa_vllm.compression.quantize import quantize_columns, quantize_factors, round_matrix
from pifa_vllm.factorization import by_columns, factorize
from pifa_vllm.quantization import DTYPES, QuantizedPIFA, round_to_nearest

KINDS = list(DTYPES.values())


def correlated(n, seed=0):
    x = torch.randn(4 * n + 4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.diag(torch.logspace(0, -2, n, dtype=torch.float64)) + x.mean(dim=1, keepdim=True)
    return x.T @ x / len(x)


def error(wanted, found, gram):
    lost = wanted.double() - found.double()
    return float(((lost @ gram) * lost).sum())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize(("m", "k"), [(40, 96), (96, 40), (33, 300)])
def test_feedback_is_better_than_rounding_to_round_to_nearest(m, k, group_size, dtype):
    matrix, gram = torch.randn(m, k, dtype=torch.float64), correlated(k)
    found, plain = round_matrix(matrix, gram, dtype, group_size), round_to_nearest(matrix, dtype, group_size)
    assert error(matrix, found.values(), gram) < 0.9 * error(matrix, plain.values(), gram)


@pytest.mark.parametrize("dtype", KINDS)
def test_errors_of_rows_move_onto_other_rows_too(dtype):
    matrix, gram, rows = torch.randn(64, 96, dtype=torch.float64), correlated(96), correlated(64, seed=1)

    def cost(found):
        lost = matrix - found.values().double()
        return float(torch.trace(rows @ lost @ gram @ lost.T))

    assert cost(round_matrix(matrix, gram, dtype, 32, rows)) < 0.9 * cost(
        round_matrix(matrix, gram, dtype, 32)
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_what_lies_on_the_grid_stays(dtype):
    low, high = (-127, 128) if dtype == torch.int8 else (-7, 8)
    numbers = torch.randint(low, high, (9, 70)).double()
    numbers[:, 0], numbers[:, 32], numbers[:, 64] = high - 1, high - 1, high - 1
    found = round_matrix(numbers / 64, correlated(70), dtype, 32)
    torch.testing.assert_close(found.values(), (numbers / 64).float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", FACTORS.values(), ids=list(FACTORS))
@pytest.mark.parametrize(
    ("m", "n", "rank"), [(60, 96, 24), (96, 60, 40), (30, 30, 30), (20, 30, 0), (5, 123, 1)]
)
def test_factors_of_every_shape(m, n, rank, kind, columns):
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, rank), (rank, n)))
    rows, gram = factorize(u, v), correlated(n)
    factors = by_columns(rows) if columns else rows
    quantize = quantize_columns if columns else quantize_factors
    found = quantize(factors, rows.dense(), gram, kind)
    assert found.pivot_weight.numbers.dtype == kind.dtype
    assert found.coefficients.numbers.dtype == kind.coefficient_dtype
    assert torch.equal(found.pivots, factors.pivot_columns if columns else factors.pivot_rows)
    wanted, values = factors.dense(), found.values().dense()
    torch.testing.assert_close(wanted, rows.dense())
    assert values.shape == (m, n)
    rounded = (
        round_to_nearest(factors.pivot_weight.float(), kind.dtype, kind.group),
        round_to_nearest(factors.coefficients.float(), kind.coefficient_dtype, kind.group),
    )
    plain = QuantizedPIFA(*rounded, found.pivots, columns).values().dense()
    if rank > 1:
        assert error(wanted, values, gram) < 0.7 * error(wanted, plain, gram)


def test_a_metric_of_few_tokens_is_enough():
    """Inputs that never vary say nothing; the rest must still be rounded."""
    gram = torch.zeros(40, 40, dtype=torch.float64)
    gram[0, 0] = 1.0
    matrix = torch.randn(12, 40, dtype=torch.float64)
    found = round_matrix(matrix, gram, torch.int8, 0).values()
    assert float((found - matrix).abs().max()) < 0.1
    assert bool(torch.isfinite(round_matrix(matrix, torch.zeros_like(gram), torch.uint8, 32).values()).all())
    assert regularised(gram, 0.01).diagonal().min() > 0
