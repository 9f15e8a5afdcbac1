"""torch.compile and CUDA graphs: the op is a node like any other, and compiled graphs are found again."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.plugin.reference import answers_of, check, make_prompts
from tests.plugin.script import run_script

pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm

TOKENS = 6
PROMPTS = make_prompts([1, 9, 40])


def compile_models(models, directory, cache, **options):
    directory.mkdir()
    job = {"models": [str(m) for m in models], "prompts": PROMPTS, "tokens": TOKENS, **options}
    return run_script("tests.plugin.compiled_engines", job, directory, VLLM_CACHE_ROOT=str(cache))


@pytest.fixture(scope="module")
def expected(llamas):
    return {
        name: answers_of(AutoModelForCausalLM.from_pretrained(llamas / f"{name}-twin"), PROMPTS, TOKENS)
        for name in ("first", "other")
    }


@pytest.fixture(scope="module")
def starts(llamas, tmp_path_factory):
    """Two processes one after the other that share a cache; the checkpoint then gets other ranks in its place."""
    root = tmp_path_factory.mktemp("starts")
    cache, place = root / "cache", str(root / "checkpoint")
    first, dense = compile_models(
        [llamas / "first-pifa", llamas / "first-twin"], root / "1", cache, place=place
    )
    again, other = compile_models(
        [llamas / "first-pifa", llamas / "other-pifa"], root / "2", cache, place=place
    )
    return {"first": first, "dense": dense, "again": again, "other": other}


def test_the_graph_is_as_whole_as_the_dense_models(starts):
    ours, dense = starts["first"]["counted"], starts["dense"]["counted"]
    assert ours == dense
    assert ours["graph_breaks"] == 0
    assert ours["num_models_seen"] == 1
    assert ours["num_aot_compiles"] == ours["num_aot_artifacts_saved"] == 1


def test_a_second_start_takes_the_compiled_graph_from_the_cache(starts, expected):
    counted = starts["again"]["counted"]
    assert counted["num_aot_artifacts_loaded"] == 1
    assert counted["num_aot_compiles"] == 0
    assert counted["unique_graphs"] < starts["first"]["counted"]["unique_graphs"]


def test_later_starts_say_the_same(starts, expected):
    check(starts["first"]["said"], expected["first"])
    check(starts["again"]["said"], expected["first"])


def test_ranks_are_part_of_the_key(llamas, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    hashes = set()
    for name in ("first-pifa", "second-pifa", "other-pifa"):
        shutil.copytree(llamas / name, tmp_path / "model", dirs_exist_ok=True)
        hashes.add(EngineArgs(model=str(tmp_path / "model")).create_engine_config().compute_hash())
    assert len(hashes) == 2  # the first two have the same ranks


def test_other_ranks_are_compiled_anew(starts, expected):
    counted = starts["other"]["counted"]
    assert counted["num_aot_compiles"] == 1
    assert counted["num_aot_artifacts_loaded"] == 0
    check(starts["other"]["said"], expected["other"])


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="vLLM's passes over pieces name ops that its CPU build lacks"
)
def test_as_many_pieces_as_the_dense_model(llamas, tmp_path, expected):
    models = [llamas / "first-pifa", llamas / "first-twin"]
    ours, dense = compile_models(models, tmp_path / "pieces", tmp_path / "cache", in_pieces=True)
    assert ours["counted"] == dense["counted"]
    # Two layers: before, between and after their attention, and the two attentions.
    assert ours["counted"]["num_piecewise_graphs_seen"] == 5
    assert ours["counted"]["num_piecewise_capturable_graphs_seen"] == 3
    check(ours["said"], expected["first"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_are_captured_as_for_the_dense_model(llamas, tmp_path, expected):
    models = [llamas / "first-pifa", llamas / "first-twin"]
    ours, dense = compile_models(models, tmp_path / "graphs", tmp_path / "cache")
    assert ours["counted"]["num_cudagraph_captured"] == dense["counted"]["num_cudagraph_captured"] > 0
    check(ours["said"], expected["first"])
