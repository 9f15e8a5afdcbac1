"""Without a GPU: what a call launches is recorded in the kernels' place."""

import contextlib

import pytest
import torch

from pifa_vllm.bench.gpu.cost_model import layer_ranks
from pifa_vllm.bench.gpu.host import launches
from pifa_vllm.bench.shapes import SHAPES
from pifa_vllm.factorization import pifa_rank
from pifa_vllm.ops.triton.configs import Device, bucket, buckets
from pifa_vllm.ops.triton.linear import linear_cuda
from pifa_vllm.quantization import groups, row_width

MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148}
MOST_TOKENS = 8192


class Recorder:
    """Takes a kernel's place, and keeps what Triton compiles it for: types, options, and kinds of numbers."""

    def __init__(self, kernel, variants, grids):
        self.kernel, self.variants, self.grids = kernel, variants, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.record

    def record(self, *arguments, **options):
        # The rest are constants.
        named = zip(self.kernel.arg_names, arguments, strict=False)
        of = tuple(self.specialized(name, value) for name, value in named)
        self.variants.add((self.kernel, of, tuple(sorted(options.items()))))

    def specialized(self, name, value):
        if isinstance(value, tuple):
            return tuple(self.specialized(name, x) for x in value)
        if isinstance(value, torch.Tensor):
            return value.dtype
        if name in self.kernel.do_not_specialize or value is None:
            return type(value)
        return value == 1 or value % 16 == 0


@contextlib.contextmanager
def recorded(device):
    variants, grids = set(), []
    with launches(lambda kernel: Recorder(kernel, variants, grids), device):
        yield variants, grids


def call(layer, tokens, dtype=torch.bfloat16, stored=None, group=0, density=0.5):
    ranks = layer_ranks(layer, density, pifa_rank)
    rest = [(m - r, r) for r, m in zip(ranks, layer.out_features, strict=True)]
    of_pivots, of_rest = stored or (dtype, dtype)

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    scales = ()
    if stored:
        sizes = sum(rows * groups(r, group) for rows, r in rest)
        scales = (
            empty(sum(ranks), groups(layer.n, group), dtype=torch.float16),
            empty(sizes, dtype=torch.float16),
            group,
        )
    factors = (
        empty(sum(ranks), row_width(layer.n, of_pivots), dtype=of_pivots),
        empty(sum(rows * row_width(r, of_rest) for rows, r in rest), dtype=of_rest),
        empty(layer.m, dtype=torch.int32),
    )
    x = empty(MOST_TOKENS, layer.n, dtype=dtype)
    y = linear_cuda(x[:tokens], *factors, ranks, layer.out_features, None, *scales)
    assert y.shape == (tokens, layer.m)
    assert y.dtype == dtype


# Each bucket's first and last token count and some between.
SERVED = sorted({t for size in buckets(MOST_TOKENS) for t in (size, size + 1)} | set(range(3, 8192, 97)))[:-1]


@pytest.mark.parametrize("family", MULTIPROCESSORS)
@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b"])
@pytest.mark.parametrize("stored", [None, (torch.int8, torch.int8), (torch.uint8, torch.int8)])
def test_nothing_is_compiled_after_the_largest_step(family, model, stored):
    for layer in SHAPES[model]:
        with recorded(Device(family, MULTIPROCESSORS[family])) as (variants, _):
            call(layer, MOST_TOKENS, stored=stored, group=32)
            warm = set(variants)
            for tokens in SERVED:
                call(layer, tokens, stored=stored, group=32)
            assert variants == warm
            # The test would not see anything if nothing depended on the tokens.
            assert len(warm) > 4


def test_a_smaller_first_call_leaves_the_larger_ones_for_later():
    layer = SHAPES["llama3-8b"][0]
    with recorded(Device("sm_90", 132)) as (variants, _):
        call(layer, 5)
        few = set(variants)
        call(layer, MOST_TOKENS)
        assert few < variants


def test_a_graphs_capture_gets_its_own_launches_only(monkeypatch):
    layer = SHAPES["llama3-8b"][0]
    with recorded(Device("sm_90", 132)) as (_, grids):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        call(layer, 512)
        captured = len(grids)
        call(layer, 512)
        assert len(grids) == 2 * captured


def test_every_token_count_has_a_bucket_that_is_little_larger():
    for tokens in range(1, 20_000):
        size = bucket(tokens)
        assert tokens <= size
        assert bucket(size) == size
        assert size - tokens < max(64, tokens / 8)
    assert list(buckets(1)) == [1]
    assert list(buckets(200)) == [1, 16, 32, 64, 128, 192, 256]


def test_plain_factors_without_rows_are_refused():
    x = torch.empty(3, 4, device="meta")
    with recorded(Device("sm_90", 132)), pytest.raises(ValueError, match="out_rows"):
        linear_cuda(x, x[:2], x.new_empty(4), None, [2], [4], None)
