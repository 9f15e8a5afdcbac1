"""What each rank holds and computes, all ranks in one process: their outputs together are the layer's."""

import math

import pytest
import torch

pytest.importorskip("vllm")

from pifa_vllm.factorization import PIFA
from pifa_vllm.plugin import parallel
from pifa_vllm.plugin.column import ColumnLayout
from pifa_vllm.plugin.layout import Parameters, Shard
from pifa_vllm.plugin.row import RowLayout

N = 24
SUFFIXES = ("pivot_weight", "coefficients", "pivot_rows")


def make_module(m, n, rank, seed, rows=None):
    """Random factors, or a dense matrix for rank None, and the matrix."""
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        weight = torch.randn(m, n, generator=generator, dtype=torch.float32)
        return {"weight": weight}, weight
    if rows is None:
        rows = torch.randperm(m, generator=generator)[:rank].sort().values.int()
    weight = torch.randn(rank, n, generator=generator, dtype=torch.float32)
    coefficients = torch.randn(m - rank, rank, generator=generator, dtype=torch.float32)
    factors = PIFA(weight, coefficients, rows)
    return {suffix: getattr(factors, suffix) for suffix in SUFFIXES}, factors.dense()


def fill(layout, modules):
    """Allocate a rank's parameters, NaN at first, and load them."""
    parameters = Parameters(
        **{
            name: torch.full(shape, -1, dtype=torch.int32)
            if name == "rows"
            else torch.full(shape, math.nan, dtype=torch.float32)
            for name, shape in layout.shapes().items()
        }
    )
    pivot_rows = []
    for index, (shard, tensors) in enumerate(zip(layout.shards, modules, strict=True)):
        for suffix in shard.suffixes:
            if suffix != "pivot_rows":
                part = layout.part(index, suffix, parameters)
                cut = layout.cut(index, suffix, tensors[suffix])
                assert part.shape == cut.shape
                part.copy_(cut)
        pivot_rows.append(tensors.get("pivot_rows", torch.arange(shard.m)))
    parameters.rows.copy_(layout.rows(pivot_rows))
    return parameters


def column_ranks(sizes, ranks, tp_size, replicas=1, rows=None):
    """Every rank's layout and parameters, and the whole matrices."""
    modules, matrices = [], []
    for seed, (m, rank) in enumerate(zip(sizes, ranks, strict=True)):
        tensors, matrix = make_module(m, N, rank, seed, rows)
        modules.append(tensors)
        matrices.append(matrix)
    copies = [1, replicas, replicas][: len(sizes)]
    held = []
    for i in range(tp_size):
        outputs = []
        for m, c in zip(sizes, copies, strict=True):
            size = m * c // tp_size
            outputs.append((i // c * size, i // c * size + size))
        shards = [Shard(f"module{j}", r, m, N) for j, (m, r) in enumerate(zip(sizes, ranks, strict=True))]
        layout = ColumnLayout(
            shards, outputs, [t.get("pivot_rows") for t in modules], i, tp_size, gather=lambda own: own
        )
        held.append((layout, fill(layout, modules), outputs))
    return held, matrices


COLUMNS = {
    "single": ((32,), (7,), 1),
    "qkv": ((32, 16, 16), (13, 5, 9), 1),
    "odd ranks": ((24, 24), (1, 23), 1),
    "a dense shard": ((32, 16, 16), (13, None, 9), 1),
    "all rows are pivots": ((16, 16), (16, 3), 1),
    "rank 0": ((16, 16), (0, 5), 1),
    "only rank 0": ((16,), (0,), 1),
    "one pivot in all": ((16,), (1,), 1),
}


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("case", COLUMNS)
def test_column_ranks_compute_the_layer(case, tp_size):
    sizes, ranks, replicas = COLUMNS[case]
    check_columns(*column_ranks(sizes, ranks, tp_size, replicas))


@pytest.mark.parametrize(("tp_size", "kv_heads"), [(4, 2), (8, 2), (8, 1), (2, 1)])
def test_key_and_value_heads_fewer_than_ranks_are_held_by_several(tp_size, kv_heads):
    head = 4
    check_columns(
        *column_ranks((64, kv_heads * head, kv_heads * head), (17, 3, None), tp_size, tp_size // kv_heads)
    )


@pytest.mark.parametrize("rows", [range(8), range(24, 32), range(0, 32, 4)])
def test_pivot_rows_that_lie_on_some_ranks_only(rows):
    rows = torch.tensor(list(rows), dtype=torch.int32)
    check_columns(*column_ranks((32,), (8,), 4, rows=rows))


def check_columns(held, matrices):
    x = torch.randn(5, N, dtype=torch.float32)
    started = [layout.start(parameters, x) for layout, parameters, _ in held]
    shared = torch.cat([own for own, _ in started], dim=-1)
    # What the real gather returns is cut to the stack by `start`, which saw one rank's part only.
    y_p = shared[..., : sum(shard.rank or 0 for shard in held[0][0].shards)]
    for (layout, parameters, outputs), (_, kept) in zip(held, started, strict=True):
        bias = torch.randn(sum(end - begin for begin, end in outputs), dtype=torch.float32)
        expected = torch.cat(
            [x @ w[begin:end].T for w, (begin, end) in zip(matrices, outputs, strict=True)], -1
        )
        y = layout.finish(parameters, y_p, kept, bias)
        torch.testing.assert_close(y, expected + bias, rtol=1e-4, atol=1e-4)


def test_column_ranks_share_the_numbers_evenly():
    sizes, ranks = (256, 64, 64), (75, 31, 20)
    held, _ = column_ranks(sizes, ranks, 4)
    numbers = [p.pivot_weight.numel() + p.coefficients.numel() for _, p, _ in held]
    total = sum(r * N + (m - r) * r for m, r in zip(sizes, ranks, strict=True))
    assert sum(numbers) == total
    assert max(numbers) < 1.2 * total / 4


def test_pivot_rows_are_held_once():
    """What other plugins got wrong: every rank with the first one's part."""
    held, _ = column_ranks((32, 16), (13, 6), 4)
    parts = [p.pivot_weight for _, p, _ in held]
    rows = torch.cat(parts)
    assert len(rows) == 19
    assert len(torch.unique(rows, dim=0)) == 19


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rank", [0, 1, 5, 7, 12, 24])
def test_row_ranks_sum_to_the_layer(rank, tp_size):
    m, n = 32, 24
    tensors, matrix = make_module(m, n, rank, 0)
    x, bias = torch.randn(5, n, dtype=torch.float32), torch.randn(m, dtype=torch.float32)
    size = n // tp_size

    def layouts(reduce_scatter):
        for i in range(tp_size):
            inputs = (i * size, (i + 1) * size)
            yield (
                i,
                inputs,
                RowLayout(Shard("down", rank, m, n), inputs, i, tp_size, lambda y, i=i: reduce_scatter(i, y)),
            )

    partial = {}

    def remember(i, y):
        partial[i] = y
        return torch.zeros_like(y[..., : y.shape[-1] // tp_size])

    def scatter(i, y):
        share = y.shape[-1] // tp_size
        return sum(partial.values())[..., i * share : (i + 1) * share]

    for _, (begin, end), layout in layouts(remember):
        layout.apply(fill(layout, [tensors]), x[:, begin:end], None)
    total, numbers = 0, 0
    for i, (begin, end), layout in layouts(scatter):
        parameters = fill(layout, [tensors])
        numbers += parameters.pivot_weight.numel() + parameters.coefficients.numel()
        total = total + layout.apply(parameters, x[:, begin:end], bias if i == 0 else None)
    torch.testing.assert_close(total, x @ matrix.T + bias, rtol=1e-4, atol=1e-4)
    assert numbers == rank * n + (m - rank) * rank


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8)])
def test_sums_are_scattered_over_features_whatever_the_axes_before(monkeypatch, shape):
    ranks = 2

    def as_on_gpus(y, dim=-1):
        # What vLLM's communicator for CUDA does, but for the sum.
        moved = y.movedim(0, dim + y.dim())
        return moved[: moved.shape[0] // ranks].movedim(0, dim + y.dim())

    monkeypatch.setattr(parallel, "tensor_model_parallel_reduce_scatter", as_on_gpus)
    y = torch.empty(shape, device="meta")
    assert parallel._reduce_scatter(y).shape == (*shape[:-1], shape[-1] // ranks)
