"""The linear method on layers outside an engine: loading of shards, its checks, and its product."""

import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from pifa_vllm.checkpoint import PIFAConfig
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.factorization import PIFA
from pifa_vllm.plugin.layout import Shard
from pifa_vllm.plugin.linear import PIFALinearMethod
from pifa_vllm.plugin.view import CheckpointView
from tests.pifa_tiny import factors_of

N = 32
SIZES = (48, 16, 16)
RANKS = (20, None, 7)
NAMES = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")


@pytest.fixture(autouse=True)
def one_pipeline_rank(monkeypatch):
    group = type("Group", (), {"world_size": 1})
    monkeypatch.setattr("pifa_vllm.plugin.linear.get_pp_group", group)


def make_layer(shards, sizes, dtype=torch.float32, tp_size=1):
    """The part of vLLM's LinearBase that the method relies on."""
    view = CheckpointView(
        PIFAConfig(density=0.5, ranks={s.name: s.rank for s in shards if s.rank is not None})
    )
    for shard in shards:
        view.shards(shard.name, {}, has_bias=False)
    layer = nn.Module()
    layer.prefix, layer.tp_size = "layers.0.self_attn.qkv_proj", tp_size
    layer.quant_method = PIFALinearMethod(view, shards)
    layer.quant_method.create_weights(layer, N, list(sizes), N, sum(sizes), dtype)
    return layer


def qkv_layer(**settings):
    return make_layer([Shard(n, r) for n, r in zip(NAMES, RANKS, strict=True)], SIZES, **settings)


def qkv_tensors():
    """(parameter, shard id) to tensor, and the dense matrices that they stand for."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, N, generator=generator) for m in SIZES]
    tensors, dense = {}, []
    for shard, weight, rank in zip("qkv", weights, RANKS, strict=True):
        if rank is None:
            tensors["weight", shard] = weight
            dense.append(weight)
            continue
        factors = factors_of(weight, rank).to(torch.float32)
        tensors["pivot_weight", shard] = factors.pivot_weight
        tensors["coefficients", shard] = factors.coefficients
        tensors["pivot_rows", shard] = factors.pivot_rows
        dense.append(factors.dense())
    return tensors, torch.cat(dense)


def load(layer, tensors):
    for (suffix, shard), tensor in tensors.items():
        parameter = getattr(layer, suffix)
        parameter.weight_loader(parameter, tensor, shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_reverse", [False, True])
def test_shards_of_unequal_ranks_beside_a_dense_one(dtype, in_reverse):
    tensors, dense = qkv_tensors()
    if in_reverse:
        tensors = dict(reversed(tensors.items()))
    layer = qkv_layer(dtype=dtype)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    x, bias = torch.randn(5, N), torch.randn(sum(SIZES))
    y = layer.quant_method.apply(layer, x.to(dtype), bias.to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(y.float(), x @ dense.T + bias, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ranks", [RANKS, (32, 16, 16), (0, None, 7), (0, 0, 0)])
def test_reloading_counts_a_layer_complete_with_its_last_tensor(ranks):
    """By vLLM's own count: parts that are empty must be waited for, too."""
    meta = pytest.importorskip("vllm.model_executor.model_loader.reload.meta")
    utils = pytest.importorskip("vllm.model_executor.model_loader.reload.utils")
    if not hasattr(utils, "get_tensor_load_numel"):
        pytest.skip("before 0.32 vLLM processes such layers at the end of a reload")
    layer = make_layer([Shard(n, r) for n, r in zip(NAMES, ranks, strict=True)], SIZES)
    tensors = []
    for shard in layer.quant_method.shards:
        for suffix in shard.suffixes:
            pivot_rows = torch.arange(shard.pivots, dtype=torch.int32)
            tensor = pivot_rows if suffix == "pivot_rows" else torch.zeros(shard.shape(suffix))
            tensors.append((suffix, shard, tensor))
    total = utils.get_layer_size(layer)
    for last in range(len(tensors)):
        loaded = 0
        for suffix, shard, tensor in [*tensors[:last], *tensors[last + 1 :], tensors[last]]:
            assert loaded < total
            parameter = getattr(layer, suffix)
            bound = inspect.signature(parameter.weight_loader).bind(
                parameter, tensor, layer.quant_method.shards.index(shard)
            )
            loaded += meta.get_numel_loaded(parameter.weight_loader, bound)[0]
        assert loaded == total


def test_a_single_module_is_loaded_without_a_shard_id():
    layer = make_layer([Shard("layers.0.mlp.down_proj", 9)], [24])
    factors = factors_of(torch.randn(24, N), 9).to(torch.float32)
    for suffix in ("pivot_weight", "coefficients", "pivot_rows"):
        parameter = getattr(layer, suffix)
        parameter.weight_loader(parameter, getattr(factors, suffix))
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 3, N)
    y = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(y, x @ factors.dense().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 16])
def test_extreme_ranks(rank):
    layer = make_layer(
        [Shard("layers.0.self_attn.k_proj", rank), Shard("layers.0.self_attn.v_proj", 3)], [16, 16]
    )
    rows = torch.arange(rank, dtype=torch.int32)
    shards = [
        PIFA(torch.randn(rank, N), torch.randn(16 - rank, rank), rows),
        factors_of(torch.randn(16, N), 3).to(torch.float32),
    ]
    for index, factors in enumerate(shards):
        load(layer, {(s, index): getattr(factors, s) for s in ("pivot_weight", "coefficients", "pivot_rows")})
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(4, N)
    expected = torch.cat([x @ s.dense().T for s in shards], dim=-1)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_read_where_they_were_loaded():
    tensors, _ = qkv_tensors()
    layer = qkv_layer()
    load(layer, tensors)
    before = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    layer.quant_method.process_weights_after_loading(layer)
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == before


@pytest.mark.parametrize(
    "missing", [("weight", "k"), ("pivot_weight", "v"), ("coefficients", "q"), ("pivot_rows", "v")]
)
def test_a_missing_tensor_is_named(missing):
    tensors, _ = qkv_tensors()
    del tensors[missing]
    layer = qkv_layer()
    load(layer, tensors)
    name = NAMES["qkv".index(missing[1])]
    with pytest.raises(CheckpointError, match=rf"layer {name}: tensor {name}.{missing[0]} is missing"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (("pivot_weight", "q"), lambda t: t[:-1], r"pivot_weight: expected \[20, 32\], found \[19, 32\]"),
        (("coefficients", "v"), lambda t: t.T, r"coefficients: expected \[9, 7\], found \[7, 9\]"),
        (("pivot_rows", "v"), lambda t: t + 16, r"pivot_rows: expected rows in \[0, 16\), found \d+"),
        (("pivot_rows", "q"), lambda t: t - 48, r"pivot_rows: expected rows in \[0, 48\), found -\d+"),
        (("pivot_rows", "q"), lambda t: t.flip(0), "pivot_rows: expected strictly increasing rows"),
        (("pivot_rows", "q"), lambda t: t.long(), r"pivot_rows: expected int32 \[20\], found torch.int64"),
        (("weight", "k"), lambda t: t[:, 1:], r"weight: expected \[16, 32\], found \[16, 31\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_while_loading(key, change, message):
    tensors, _ = qkv_tensors()
    tensors[key] = change(tensors[key])
    name = NAMES["qkv".index(key[1])]
    with pytest.raises(CheckpointError, match=f"layer {name}: tensor {name}.{message}"):
        load(qkv_layer(), tensors)


@pytest.mark.parametrize(("suffix", "shard"), [("weight", "q"), ("pivot_weight", "k"), ("pivot_rows", "k")])
def test_a_tensor_of_the_other_form_is_refused(suffix, shard):
    name = NAMES["qkv".index(shard)]
    with pytest.raises(CheckpointError, match=f"tensor {name}.{suffix} is not expected"):
        load(qkv_layer(), {(suffix, shard): torch.zeros(16, N)})


@pytest.mark.parametrize("key", [("pivot_weight", "v"), ("coefficients", "q"), ("weight", "k")])
def test_values_that_are_not_finite_are_refused(key):
    tensors, _ = qkv_tensors()
    tensors[key][0, 0] = float("nan")
    layer = qkv_layer()
    load(layer, tensors)
    with pytest.raises(CheckpointError, match=f"{NAMES['qkv'.index(key[1])]}.{key[0]}.*found 1 NaN"):
        layer.quant_method.process_weights_after_loading(layer)


def test_overflow_in_the_served_dtype_is_refused():
    tensors, _ = qkv_tensors()
    tensors["pivot_weight", "q"][0, 0] = 1e6
    layer = qkv_layer(dtype=torch.float16)
    load(layer, tensors)
    with pytest.raises(CheckpointError, match=r"q_proj.pivot_weight \(torch.float16\).*found 1 NaN or inf"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_second_load_is_checked_by_itself():
    tensors, _ = qkv_tensors()
    layer = qkv_layer()
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(CheckpointError, match="is missing"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_rank_beyond_the_layer_is_refused():
    with pytest.raises(CheckpointError, match=r"ranks\['v'\]: expected at most 16 .*\[16, 32\], found 17"):
        make_layer([Shard("v", 17)], [16])


def test_a_fused_layer_of_other_parts_is_refused():
    with pytest.raises(UnsupportedModelError, match="found 1 parts"):
        make_layer([Shard("gate_proj", 3), Shard("up_proj", 3)], [32])


@pytest.mark.parametrize("pipeline_ranks", [1, 2])
def test_pipeline_ranks_build_only_some_layers(monkeypatch, pipeline_ranks):
    group = type("Group", (), {"world_size": pipeline_ranks})
    monkeypatch.setattr("pifa_vllm.plugin.linear.get_pp_group", group)
    tensors, _ = qkv_tensors()
    layer = qkv_layer()
    layer.quant_method.view.ranks["layers.1.self_attn.q_proj"] = 4
    if pipeline_ranks > 1:
        load(layer, tensors)
    else:
        with pytest.raises(CheckpointError, match=r"1 modules .* first 'layers.1.self_attn.q_proj'"):
            load(layer, tensors)
