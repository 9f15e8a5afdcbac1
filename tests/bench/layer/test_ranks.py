import json

import pytest

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.layer.ranks import results, share_table, shares

README = RESULTS.parents[1] / "plugin" / "README.md"


@pytest.fixture(scope="module")
def found():
    return {(share.scheme, share.ranks): share for share in shares("llama2-70b", 0.5)}


@pytest.mark.parametrize("t", [2, 4, 8])
def test_a_rank_holds_its_part_of_the_layers(found, t):
    whole, dense = found["split", 1], found["dense", 1]
    # Where the pivot rows lie is chance: the fullest rank may hold a little more.
    assert whole.bytes / t <= found["split", t].bytes < 1.02 * whole.bytes / t
    assert found["dense", t].bytes == dense.bytes / t
    assert found["replicated", t].bytes > 1.2 * whole.bytes / t


def test_one_rank_sends_nothing(found):
    for scheme in ("dense", "replicated", "refactorised", "split"):
        assert found[scheme, 1].traffic == 0
        assert found[scheme, 1].collectives == 0


def test_dense_traffic_is_that_of_two_all_reduces(found):
    # Two of 8192 bfloat16 numbers in each of 80 layers, in a ring of 8.
    assert found["dense", 8].traffic == 80 * 2 * 2 * 8192 * 2 * 7 / 8


def test_the_committed_counts_are_todays_and_in_the_readme():
    committed = json.loads((RESULTS / "tensor-parallel.json").read_text())
    models = list(committed["models"])
    assert results(models, committed["density"], committed["command"]) == committed
    for model in models:
        assert share_table(committed, model) in README.read_text()
