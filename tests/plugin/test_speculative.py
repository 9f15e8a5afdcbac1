"""Speculative decoding with PIFA models on either side says what the target says alone."""

import json
import os
import random
import subprocess
import sys

import httpx
import pytest
import torch

from tests.pifa_tiny import save_pifa_twin
from tests.release import vllm_before
from tests.server.serving import serve
from tests.tiny import save_tiny_model

pytest.importorskip("vllm")

from pifa_vllm.plugin.verification import expand_batch_to_tokens

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_before("0.32"), reason="vLLM's speculation does not run on CPUs"),
]

DRAFTED = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
# Target, and draft or the whole speculative configuration.
PAIRS = {
    "dense-pifa": ("dense", "pifa"),
    "twin-pifa": ("twin", "pifa"),
    "pifa-dense": ("pifa", "dense"),
    "pifa-low": ("pifa", "low"),
    "compiled": ("dense", "pifa"),
    "pifa-ngram": ("pifa", NGRAM),
}


def make_prompts():
    draw = random.Random(0)
    return [[256, *(draw.randrange(256) for _ in range(n))] for n in (1, 5, 17, 33, 50, 20)]


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("drafts")
    # vLLM's CPU attention takes head sizes from 32 on.
    dense = save_tiny_model(root / "dense", hidden=128, intermediate=176)

    def ranks(name, m, n):
        return None if name.endswith(("0.self_attn.k_proj", "1.mlp.down_proj")) else round(0.6 * min(m, n))

    save_pifa_twin(dense, root / "pifa", root / "twin", ranks=ranks)
    save_pifa_twin(dense, root / "low", root / "low-twin", ranks=lambda _, m, n: min(m, n) // 3)
    return root


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    def job(target, draft=None, **options):
        config = draft
        if isinstance(draft, str):
            config = {
                "method": "draft_model",
                "model": str(models / draft),
                "num_speculative_tokens": DRAFTED,
            }
        return {
            "model": str(models / target),
            "speculative_config": config,
            "options": options,
            "prompts": PROMPTS,
        }

    jobs = {
        # First, as it would be in a process of its own: eager engines leave their rotary embedding behind.
        "compiled": job("dense", "pifa", enforce_eager=False),
        **{target: job(target) for target in ("dense", "twin", "pifa")},
        # n-grams last: they load numba, and vLLM's workers cannot start in a process that has it.
        **{name: job(*pair) for name, pair in PAIRS.items() if name != "compiled"},
    }
    directory = tmp_path_factory.mktemp("served")
    (directory / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # It would win over the size of the KV cache that the jobs ask for.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.plugin.speculating",
            directory / "jobs.json",
            directory / "results.json",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((directory / "results.json").read_text())


def certain(gaps, tie):
    """Count the tokens before the first one with a second best as close as this."""
    return next((i for i, gap in enumerate(gaps) if gap < tie), len(gaps))


@pytest.mark.parametrize("name", PAIRS)
def test_says_what_the_target_says(name, served):
    result, alone = served[name], served[PAIRS[name][0]]
    assert "error" not in result, result
    compared = 0
    # At the lowest temperature the second best token is drawn once in exp(gap / 0.01) times.
    for way, tie in {"greedy": 1e-3, "again": 1e-3, "top_k": 1e-3, "top_p": 1e-3, "cold": 0.2}.items():
        for answer, wanted, gaps in zip(result[way], alone["greedy"], alone["gaps"], strict=True):
            count = certain(gaps, tie)
            assert answer[:count] == wanted[:count], way
            compared += count
        assert list(map(len, result[way])) == list(map(len, alone["greedy"]))
    for answer, wanted, gaps in zip(result["mixed"], alone["greedy"][::2], alone["gaps"][::2], strict=True):
        assert answer[: certain(gaps, 1e-3)] == wanted[: certain(gaps, 1e-3)]
    # The comparison is worth something only if most answers were compared to their end.
    assert compared > 3 * sum(map(len, alone["greedy"]))


@pytest.mark.parametrize("name", PAIRS)
def test_seeds_repeat(name, served):
    first, second = served[name]["seeded"]
    assert first == second
    assert first != served[name]["greedy"]


def test_both_models_have_their_own_layers(served):
    layer = "model.layers.0.self_attn.qkv_proj"
    assert served["dense-pifa"]["methods"][layer] == "UnquantizedLinearMethod"
    assert served["dense-pifa"]["draft_methods"][layer] == "PIFALinearMethod"
    assert served["dense-pifa"]["draft_methods"]["model.layers.1.mlp.down_proj"] == "StreamedLinearMethod"
    assert served["pifa-dense"]["methods"][layer] == "PIFALinearMethod"
    assert served["pifa-dense"]["draft_methods"][layer] == "UnquantizedLinearMethod"
    assert served["pifa-low"]["methods"]["model.layers.1.mlp.down_proj"] == "StreamedLinearMethod"
    assert served["pifa-low"]["draft_methods"]["model.layers.1.mlp.down_proj"] == "PIFALinearMethod"


def test_a_draft_that_is_the_target_is_accepted(served):
    result = served["twin-pifa"]
    # Float32 sums in another order, so a tie may fall the other way.
    assert result["accepted"] > 0.95 * result["drafted"] > 0


@pytest.mark.parametrize("name", ["dense-pifa", "compiled", "pifa-low", "pifa-dense"])
def test_other_drafts_are_accepted_in_part(name, served):
    result = served[name]
    assert 0 < result["accepted"] < result["drafted"] <= DRAFTED * result["drafts"]
    steps = sum(map(len, result["greedy"])) - len(PROMPTS)
    # Each step of the target gives the tokens that it accepted and one of its own.
    spare = len(PROMPTS) * DRAFTED  # accepted beyond max_tokens
    assert steps <= result["accepted"] + result["drafts"] <= steps + spare


def test_serve_drafts_over_two_ranks(models, served, tmp_path):
    flags = (
        "--draft-for",
        str(models / "dense"),
        "--draft-tokens",
        str(DRAFTED),
        "--tensor-parallel-size",
        "2",
    )
    with serve(
        models / "pifa", tmp_path / "log", *flags, "--dtype", "float32", "--max-model-len", "256"
    ) as server:
        for prompt, wanted, gaps in zip(
            PROMPTS, *(served["dense"][what] for what in ("greedy", "gaps")), strict=True
        ):
            request = {"model": "tiny", "prompt": prompt, "max_tokens": len(wanted), "temperature": 0}
            options = {"ignore_eos": True, "return_token_ids": True}
            answer = httpx.post(
                f"{server.url}/v1/completions", json={**request, **options}, timeout=300
            ).json()
            count = certain(gaps, 1e-3)
            assert answer["choices"][0]["token_ids"][:count] == wanted[:count]
        metrics = server.metrics()
    drafted = metrics.total("vllm:spec_decode_num_draft_tokens_total")
    assert 0 < metrics.total("vllm:spec_decode_num_accepted_tokens_total") < drafted


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_requests_value_is_repeated_for_its_tokens(dtype):
    values = torch.tensor([3, 0, 7, 5], dtype=dtype)
    found = expand_batch_to_tokens(values, torch.tensor([2, 3, 3, 6], dtype=torch.int32), 6, 0, 1)
    assert found.tolist() == [3, 3, 1, 5, 5, 5]
    assert found.dtype == dtype
    assert expand_batch_to_tokens(values[:1], torch.tensor([0], dtype=torch.int32), 0).shape == (0,)
