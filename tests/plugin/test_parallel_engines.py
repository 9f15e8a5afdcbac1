"""Several ranks on this machine, started by vLLM's own executors, say what one says."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm")

from pifa_vllm.checkpoint import FactorFormat
from tests.pifa_tiny import save_pifa_twin
from tests.plugin.test_engines import check_answers, ranks, run_engines, transformers_says
from tests.tiny import save_tiny_model

# The first test waits for six processes with engines.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

# Architecture and heads for keys and values: grouped, fewer than ranks and with biases, one for each of 4 queries.
MODELS = {"grouped": ("llama", 2), "shared": ("qwen2", 1), "many": ("llama", 4)}
# By rows and not in groups: the tiny model's 88 inputs of a rank are no multiple of a group.
INT8 = FactorFormat(bits=8, coefficient_bits=8, pivot_columns=["gate_proj", "up_proj"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    for name, (architecture, kv_heads) in MODELS.items():
        save_tiny_model(root / name, architecture, hidden=128, intermediate=176, kv_heads=kv_heads)
        save_pifa_twin(root / name, root / f"{name}-pifa", root / f"{name}-twin", ranks=ranks)
    save_pifa_twin(root / "grouped", root / "int8-pifa", root / "int8-twin", ranks=ranks, kind=INT8)
    return root


def run(models, directory, *names, stages=1):
    """Serve models over two ranks, in so many pipeline stages each."""
    # vLLM's pipeline stages run compiled only on CPUs, dense models' too.
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": stages, "enforce_eager": stages == 1}
    jobs = {n: {"model": str(models / f"{n}-pifa"), "options": sizes, "digest": True} for n in names}
    return run_engines(jobs, directory, timeout=1200, VLLM_CPU_OMP_THREADS_BIND="nobind")


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    return run(models, tmp_path_factory.mktemp("served"), "grouped", "shared", "int8")


@pytest.fixture(scope="module")
def staged(models, tmp_path_factory):
    return run(models, tmp_path_factory.mktemp("staged"), "many", stages=2)


@pytest.mark.parametrize("name", ["grouped", "shared"])
def test_several_ranks_say_what_transformers_says(name, served, models):
    check_answers(served[name], transformers_says(models / f"{name}-twin"), prompts_without_ties=20)


def test_ranks_with_quantized_factors_say_what_transformers_says(served, models):
    # Activations are rounded to 16 bits on CPUs.
    check_answers(
        served["int8"], transformers_says(models / "int8-twin"), prompts_without_ties=10, tolerance=5e-3
    )


@pytest.mark.long
def test_stages_say_what_transformers_says(staged, models):
    check_answers(staged["many"], transformers_says(models / "many-twin"), prompts_without_ties=20)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["grouped", "shared"])
def test_every_rank_holds_its_own_share(name, served, models):
    """Computed from the checkpoint's tensors anew, without the layouts."""
    directory = models / f"{name}-pifa"
    tensors = load_file(directory / "model.safetensors")
    held = served[name]["digests"]
    assert len(held) == 2
    prefix = "model.layers.0.self_attn"
    # k_proj is dense: only the pivot rows of q and v are shared out.
    stack = torch.cat([tensors[f"{prefix}.{p}_proj.pivot_weight"] for p in "qv"])
    keys = tensors[f"{prefix}.k_proj.weight"]
    output, inputs = tensors[f"{prefix}.o_proj.coefficients"], tensors[f"{prefix}.o_proj.pivot_weight"]
    share, o_share = -(-len(stack) // 2), -(-output.shape[1] // 2)
    kv_heads = MODELS[name][1]
    for rank, found in enumerate(held):
        own_keys = keys.chunk(2)[rank] if kv_heads > 1 else keys
        qkv = torch.cat([stack[rank * share : (rank + 1) * share], own_keys])
        assert found[f"{prefix}.qkv_proj.pivot_weight"] == digest(qkv)
        assert found[f"{prefix}.o_proj.pivot_weight"] == digest(inputs.chunk(2, dim=1)[rank])
        columns = output[:, rank * o_share : (rank + 1) * o_share]
        assert found[f"{prefix}.o_proj.coefficients"] == digest(columns.flatten())
        # Query rows 64 rank ... 64 rank + 63, those of them that are no pivot rows.
        pivots = set(tensors[f"{prefix}.q_proj.pivot_rows"].tolist())
        rest = [row for row in range(128) if row not in pivots]
        mine = [i for i, row in enumerate(rest) if row // 64 == rank]
        queries = tensors[f"{prefix}.q_proj.coefficients"][mine]
        assert found[f"{prefix}.qkv_proj.coefficients"] == digest(queries)
    assert held[0] != held[1]


@pytest.mark.long
def test_pipeline_stages_hold_their_own_layers(staged):
    held = [set(digests) for digests in staged["many"]["digests"]]
    assert len(held) == 4  # two stages of two ranks
    for stage, ranks_of_stage in enumerate((held[:2], held[2:])):
        for names in ranks_of_stage:
            assert any(name.startswith(f"model.layers.{stage}.") for name in names)
            assert not any(name.startswith(f"model.layers.{1 - stage}.") for name in names)


@pytest.mark.long
def test_an_engine_in_a_ray_actor(models, tmp_path):
    """On a real cluster of this one machine; vLLM's own Ray executor takes no CPUs, whatever the model."""
    pytest.importorskip("ray")
    jobs = {
        "executor": {
            "model": str(models / "grouped"),
            "options": {"distributed_executor_backend": "ray"},
        },
        "actor": {"model": str(models / "grouped-pifa")},
    }
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}
    found = run_engines(jobs, tmp_path, module="tests.plugin.ray_engines", **settings)
    check_answers(found["actor"], transformers_says(models / "grouped-twin"), prompts_without_ties=20)
    assert "does not support ray" in found["executor"]["message"]
