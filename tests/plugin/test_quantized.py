"""Layers with quantized factors outside an engine: loading of shards, and what tensor-parallel ranks hold."""

import pytest
import torch

pytest.importorskip("vllm")

from pifa_vllm.checkpoint import FactorFormat
from pifa_vllm.factorization import PIFA
from pifa_vllm.plugin.column import ColumnLayout
from pifa_vllm.plugin.layout import Parameters, Shard, WholeLayout
from pifa_vllm.plugin.pivot_columns import PivotColumnsLayout
from pifa_vllm.plugin.row import RowLayout
from pifa_vllm.quantization import round_to_nearest
from tests.pifa_tiny import quantized

N = 256
KINDS = {
    "int8 rows": FactorFormat(bits=8, coefficient_bits=8),
    "int8 groups": FactorFormat(bits=8, coefficient_bits=8, group_size=64),
    "int4 groups": FactorFormat(bits=4, coefficient_bits=8, group_size=32),
    "int4": FactorFormat(bits=4, coefficient_bits=4),
    "fp8": FactorFormat(bits=8, coefficient_bits=8, type="float"),
}
# Of activations as 16-bit integers.
ROUNDING = {"rtol": 1e-3, "atol": 2e-3}


def make_module(m, n, rank, kind, seed, pivots="pivot_rows"):
    """A module's tensors in the checkpoint, and the matrix that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        found = round_to_nearest(torch.randn(m, n, generator=generator), kind.dtype, kind.group)
        return {"weight": found.numbers, "weight_scale": found.scale}, found.values()
    rows = torch.randperm(m, generator=generator)[:rank].sort().values.int()
    weight = torch.randn(rank, n, generator=generator)
    coefficients = torch.randn(m - rank, rank, generator=generator) / max(rank, 1) ** 0.5
    found = quantized(PIFA(weight, coefficients, rows), kind, pivots)
    tensors = {
        "pivot_weight": found.pivot_weight.numbers,
        "pivot_scale": found.pivot_weight.scale,
        "coefficients": found.coefficients.numbers,
        "coefficient_scale": found.coefficients.scale,
        pivots: found.pivots,
    }
    return tensors, found.values().dense()


def make_shards(sizes, ranks, kind):
    made = [make_module(m, N, r, kind, i) for i, (m, r) in enumerate(zip(sizes, ranks, strict=True))]
    shards = [Shard(f"module{i}", r, m, N, kind) for i, (m, r) in enumerate(zip(sizes, ranks, strict=True))]
    return shards, [tensors for tensors, _ in made], [matrix for _, matrix in made]


def make_columns(sizes, ranks, kind):
    kind = kind.model_copy(update={"pivot_columns": ["gate_proj", "up_proj"]})
    names, modules = ("gate_proj", "up_proj"), []
    shards = [Shard(x, r, m, N, kind) for x, m, r in zip(names, sizes, ranks, strict=True)]
    modules = [make_module(s.m, N, s.rank, kind, i, "pivot_columns") for i, s in enumerate(shards)]
    return shards, [tensors for tensors, _ in modules], [matrix for _, matrix in modules]


def fill(layout, modules):
    """Allocate a rank's parameters and load them."""
    first, allocated = layout.shards[0], {}
    for name, shape in layout.shapes().items():
        dtype = torch.int32 if name == "rows" else first.dtype(name, torch.float32)
        allocated[name] = torch.zeros(shape, dtype=torch.uint8).to(dtype)
    parameters, pivots = Parameters(**allocated, group_size=first.kind.group), []
    for index, (shard, tensors) in enumerate(zip(layout.shards, modules, strict=True)):
        assert set(shard.suffixes) == set(tensors)
        for suffix in set(shard.suffixes) - {shard.pivots_name}:
            assert list(tensors[suffix].shape) == shard.shape(suffix)
            part, cut = layout.part(index, suffix, parameters), layout.cut(index, suffix, tensors[suffix])
            assert part.shape == cut.shape
            assert part.dtype == cut.dtype
            part.copy_(cut)
        pivots.append(tensors.get(shard.pivots_name, torch.arange(shard.size)))
    parameters.rows.copy_(layout.rows(pivots))
    return parameters


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("ranks", [(45, 16, 9), (45, None, 9), (0, 5, 33), (None, None, None)])
def test_one_rank_holds_all_of_it(ranks, kind):
    sizes = (64, 32, 48)
    shards, modules, matrices = make_shards(sizes, ranks, kind)
    layout = WholeLayout(shards)
    x, bias = torch.randn(5, N), torch.randn(sum(sizes))
    y = layout.apply(fill(layout, modules), x, bias)
    torch.testing.assert_close(y, x @ torch.cat(matrices).T + bias, **ROUNDING)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("ranks", [(45, 16, 9), (45, None, 9)])
def test_column_ranks_compute_the_layer(ranks, tp_size, kind):
    sizes = (64, 32, 48)
    shards, modules, matrices = make_shards(sizes, ranks, kind)
    held = []
    for i in range(tp_size):
        outputs = [(i * m // tp_size, (i + 1) * m // tp_size) for m in sizes]
        pivot_rows = [tensors.get("pivot_rows") for tensors in modules]
        layout = ColumnLayout(shards, outputs, pivot_rows, i, tp_size, gather=lambda own: own)
        held.append((layout, fill(layout, modules), outputs))
    x = torch.randn(5, N)
    started = [layout.start(parameters, x) for layout, parameters, _ in held]
    y_p = torch.cat([own for own, _ in started], dim=-1)[..., : sum(r or 0 for r in ranks)]
    for (layout, parameters, outputs), (_, kept) in zip(held, started, strict=True):
        wanted = [x @ w[begin:end].T for w, (begin, end) in zip(matrices, outputs, strict=True)]
        y = layout.finish(parameters, y_p, kept, None)
        torch.testing.assert_close(y, torch.cat(wanted, -1), **ROUNDING)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("ranks", [(45, 16), (33, None), (None, 5), (0, 1), (64, 32)])
def test_ranks_with_pivot_columns_compute_the_layer(ranks, tp_size, kind):
    sizes = (64, 32)
    shards, modules, matrices = make_columns(sizes, ranks, kind)
    x, bias = torch.randn(2, 3, N), torch.randn(sum(sizes))
    for i in range(tp_size):
        outputs = [(i * m // tp_size, (i + 1) * m // tp_size) for m in sizes]
        layout = PivotColumnsLayout(shards, outputs)
        own = torch.cat([b[slice(*edges)] for b, edges in zip(bias.split(sizes), outputs, strict=True)])
        y = layout.apply(fill(layout, modules), x, own)
        wanted = [x @ w[slice(*edges)].T for w, edges in zip(matrices, outputs, strict=True)]
        # Activations are rounded twice, x and x_p + B x_r.
        torch.testing.assert_close(y, torch.cat(wanted, -1) + own, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("rank", [None, 0, 5, 45, 64])
def test_row_ranks_sum_to_the_layer(rank, tp_size, kind):
    (shard,), modules, (matrix,) = make_shards((64,), (rank,), kind)
    x, size, partial = torch.randn(5, N), N // tp_size, {}

    def remember(i, y):
        partial[i] = y
        return torch.zeros_like(y[..., : y.shape[-1] // tp_size])

    def scatter(i, y):
        share = y.shape[-1] // tp_size
        return sum(partial.values())[..., i * share : (i + 1) * share]

    for reduce in (remember, scatter):
        total = 0
        for i in range(tp_size):
            begin, end = i * size, (i + 1) * size
            layout = RowLayout(shard, (begin, end), i, tp_size, lambda y, i=i, f=reduce: f(i, y))
            total = total + layout.apply(fill(layout, modules), x[:, begin:end], None)
    torch.testing.assert_close(total, x @ matrix.T, **ROUNDING)
