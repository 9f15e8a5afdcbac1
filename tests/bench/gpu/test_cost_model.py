import json

import pytest

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.gpu import cost_model
from pifa_vllm.bench.gpu.cost_model import (
    GPUS,
    NUMBER,
    dense_launch,
    factored_launches,
    layer_ranks,
    layer_table,
)
from pifa_vllm.bench.shapes import SHAPES
from pifa_vllm.factorization import pifa_parameters, pifa_rank

CASES = [(gpu, model, layer) for gpu in GPUS for model in SHAPES for layer in SHAPES[model]]


def test_committed_predictions_are_those_of_this_source(tmp_path):
    cost_model.write(tmp_path / "predicted.json")
    committed = (RESULTS / "predicted-layers.json").read_text()
    assert committed == (tmp_path / "predicted.json").read_text()
    assert "not a measurement" in json.loads(committed)["kind"]


@pytest.mark.parametrize(("name", "model", "layer"), CASES, ids=lambda c: getattr(c, "name", c))
def test_no_prediction_beats_the_roofline(name, model, layer):
    gpu = GPUS[name]
    for tokens in cost_model.TOKENS:
        ranks = layer_ranks(layer, 0.5, pifa_rank)
        numbers = sum(pifa_parameters(m, layer.n, r) for r, m in zip(ranks, layer.out_features, strict=True))
        launches = factored_launches(gpu, tokens, layer, ranks)
        seconds = sum(launch.seconds(gpu) for launch in launches)
        assert sum(launch.flops for launch in launches) == 2 * tokens * numbers
        assert sum(launch.bytes for launch in launches) >= NUMBER * (numbers + tokens * (layer.n + layer.m))
        assert seconds > NUMBER * numbers / gpu.bandwidth
        assert seconds > 2 * tokens * numbers / gpu.flops
        # The same ranks without pivoting are never cheaper.
        plain = factored_launches(gpu, tokens, layer, ranks, pivoting=False)
        assert sum(launch.bytes for launch in plain) > sum(launch.bytes for launch in launches)
        assert dense_launch(gpu, tokens, layer).seconds(gpu) > 2 * tokens * layer.m * layer.n / gpu.flops


def test_one_token_of_a_large_layer_costs_its_share_of_bytes():
    layer = SHAPES["llama2-70b"][2]
    gpu = GPUS["H100"]
    ranks = layer_ranks(layer, 0.5, pifa_rank)
    dense = dense_launch(gpu, 1, layer).seconds(gpu)
    pifa = sum(launch.seconds(gpu) for launch in factored_launches(gpu, 1, layer, ranks))
    assert 1.9 < dense / pifa < 2.0


def test_the_table_shows_the_range_that_dense_may_reach_and_measurements_have_none():
    results = cost_model.predict()
    low, high = layer_table(results, 0.5).splitlines()[4].split(" | ")[-1].removesuffix(" |").split(" to ")
    # Large prefills are bound by arithmetic, of both.
    assert abs(float(low) - cost_model.TRITON_SHARES[1] * float(high)) < 0.01
    for row in results["rows"]:
        del row["fast_dense_us"]
    assert " to " not in layer_table(results, 0.5).splitlines()[4]


def test_table_has_a_row_per_gpu_and_model_and_leaves_gaps():
    results = cost_model.predict()
    results["rows"][0]["pifa_us"][2] = None
    lines = layer_table(results, 0.5).splitlines()
    assert "prediction" in lines[0]
    assert len(lines) == 4 + len(GPUS) * len(SHAPES)
    cells = [cell.strip() for cell in lines[4].split("|")]
    assert cells[1:3] == ["A100", "llama2-7b"]
    assert cells[5] == ""
    assert all(cell for i, cell in enumerate(cells[1:-1], 1) if i != 5)
