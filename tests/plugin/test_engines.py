"""Served PIFA checkpoints say what transformers says when it runs the dense matrices that they stand for."""

import json
import os
import random
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from pifa_vllm.checkpoint import FactorFormat
from pifa_vllm.compression.options import FACTORS
from tests.edit import copy_edited
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm

TOKENS = 12
# Where transformers' two best tokens are closer than this, either is a right answer.
TIE = 1e-3
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
QUANTIZED = {
    "int8": FactorFormat(bits=8, coefficient_bits=8, group_size=64),  # with pivot rows only
    "int4": FACTORS["int4"],
}


def ranks(name, m, n):
    """Unequal ranks in every fused layer; dense and full-rank modules beside compressed ones."""
    if name.endswith(("0.self_attn.k_proj", "1.mlp.up_proj", "1.mlp.down_proj")):
        return None
    if name.endswith("1.self_attn.v_proj"):
        return min(m, n)
    share = {"q_proj": 0.5, "k_proj": 0.8, "v_proj": 0.37, "gate_proj": 0.6}.get(name.rsplit(".")[-1], 0.7)
    return round(share * min(m, n))


def make_prompts():
    """Mixed lengths up to three chunks of prefill; some begin alike, for the prefix cache."""
    draw = random.Random(0)
    lengths = [1, 2, 3, 5, 7, 11, 16, 17, 25, 33, 47, 64, 65, 80, 100, 130, 150, 180, 37, 9, 55, 71]
    prompts = [[256, *(draw.randrange(256) for _ in range(length))] for length in lengths]
    return [*prompts, [*prompts[17][:160], 5, 6, 7], prompts[17][:96]]


PROMPTS = make_prompts()


class Expected(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    # Tokens before the first tie.
    certain: int


@torch.inference_mode()
def transformers_says(directory, dtype=torch.float32, tie=TIE):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        full = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        logprobs = model(full).logits[0].float().log_softmax(-1)  # [prompt + tokens, vocabulary]
        chosen = logprobs[:-1].gather(1, full[0, 1:, None]).squeeze(1).tolist()
        best = logprobs[len(prompt) - 1 : -1].topk(2).values
        ties = (best[:, 0] - best[:, 1] < tie).nonzero()
        start = len(prompt) - 1
        certain = int(ties[0]) if len(ties) else TOKENS
        found.append(Expected(full[0, len(prompt) :].tolist(), chosen[start:], chosen[:start], certain))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    for name in ARCHITECTURES:
        # vLLM's CPU attention takes head sizes from 32 on.
        save_tiny_model(root / name, name, hidden=128, intermediate=176)
        save_pifa_twin(root / name, root / f"{name}-pifa", root / f"{name}-twin", ranks=ranks)
    for name, kind in QUANTIZED.items():
        save_pifa_twin(root / "llama", root / f"{name}-pifa", root / f"{name}-twin", ranks=ranks, kind=kind)
    return root


def run_engines(jobs, directory, timeout=500, module="tests.plugin.engines", **environment):
    path, results = directory / "jobs.json", directory / "results.json"
    defaults = {"prompts": PROMPTS, "max_tokens": TOKENS, "options": {}}
    path.write_text(json.dumps({name: {**defaults, **job} for name, job in jobs.items()}))
    process = subprocess.run(
        [sys.executable, "-m", module, str(path), str(results)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(results.read_text())


def spoil(models, name, **edits):
    return str(copy_edited(models / "llama-pifa", models / f"spoilt-{name}", **edits))


def spoilt_checkpoints(models):
    """Name to a checkpoint that must be refused, and what the refusal must say."""
    layer = "model.layers.1.self_attn.o_proj"

    def set_value(tensor, value):
        def edit(tensors):
            tensors[tensor].view(-1)[-1] = value

        return edit

    def pop(tensor):
        return lambda tensors: tensors.pop(tensor)

    def rank(value):
        return lambda config: config["quantization_config"]["ranks"].update({layer: value})

    def add_module(tensors):
        for suffix in ("pivot_weight", "coefficients", "pivot_rows"):
            tensors[f"model.layers.9.mlp.up_proj.{suffix}"] = tensors[f"{layer}.{suffix}"].clone()

    def add_rank(config):
        held = config["quantization_config"]["ranks"]
        held["model.layers.9.mlp.up_proj"] = held[layer]

    return {
        "row": ({"tensors": set_value(f"{layer}.pivot_rows", 128)}, f"{layer}.pivot_rows", "found 128"),
        "nan": (
            {"tensors": set_value(f"{layer}.coefficients", float("nan"))},
            f"{layer}.coefficients",
            "1 NaN",
        ),
        "missing": ({"tensors": pop(f"{layer}.coefficients")}, f"{layer}.coefficients", "missing"),
        "missing-dense": (
            {"tensors": pop("model.layers.0.self_attn.k_proj.weight")},
            "model.layers.0.self_attn.k_proj.weight",
            "missing",
        ),
        "rank": ({"config": rank(3)}, f"{layer}.pivot_weight", "expected [3, in]"),
        "no-layer": (
            {"tensors": add_module, "config": add_rank},
            "model.layers.9.mlp.up_proj",
            "expected a linear layer of LlamaForCausalLM",
        ),
        "density": (
            {"config": lambda config: config["quantization_config"].update(density=7)},
            "quantization_config.density",
            "found 7",
        ),
    }


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    jobs = {
        # First, as it would be in a process of its own: eager engines leave their rotary embedding behind.
        "compiled": {"model": str(models / "llama-pifa"), "options": {"enforce_eager": False}},
        **{name: {"model": str(models / f"{name}-pifa")} for name in (*ARCHITECTURES, *QUANTIZED)},
        "bfloat16": {"model": str(models / "llama-pifa"), "options": {"dtype": "bfloat16"}},
        "plain": {"model": str(models / "llama")},
        **{
            f"spoilt-{name}": {"model": spoil(models, name, **edits)}
            for name, (edits, *_) in spoilt_checkpoints(models).items()
        },
    }
    return run_engines(jobs, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def expected(models):
    found = {name: transformers_says(models / f"{name}-twin") for name in ARCHITECTURES}
    return found | {name: transformers_says(models / f"{name}-twin", tie=1e-2) for name in QUANTIZED}


def check_answers(result, expected, prompts_without_ties, tolerance=1e-3):
    assert "error" not in result, result
    for answers in (result["first"], result["again"]):
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer["tokens"][: wanted.certain] == wanted.tokens[: wanted.certain]
            torch.testing.assert_close(
                torch.tensor(answer["logprobs"][: wanted.certain]),
                torch.tensor(wanted.logprobs[: wanted.certain]),
                rtol=0,
                atol=tolerance,
            )
    for answer, wanted in zip(result["scored"], expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(answer["prompt_logprobs"]),
            torch.tensor(wanted.prompt_logprobs),
            rtol=0,
            atol=tolerance,
        )
    # The comparison is worth something only if nearly every answer was compared to its end.
    assert sum(wanted.certain == TOKENS for wanted in expected) >= prompts_without_ties


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_says_what_transformers_says(name, served, expected):
    check_answers(served[name], expected[name], prompts_without_ties=20)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_factors_say_what_they_stand_for(name, served, expected):
    # Activations are rounded to 16 bits, so that more answers are as good as others.
    check_answers(served[name], expected[name], prompts_without_ties=12, tolerance=5e-3)
    # Modules that are dense are quantized, too.
    assert served[name]["methods"]["model.layers.1.mlp.down_proj"] == "PIFALinearMethod"


def test_says_it_compiled_too(served, expected):
    check_answers(served["compiled"], expected["llama"], prompts_without_ties=20)


def test_prompts_came_from_the_prefix_cache_the_second_time(served):
    for first, again, prompt in zip(served["llama"]["first"], served["llama"]["again"], PROMPTS, strict=True):
        assert again["cached"] >= first["cached"]
        # A whole prompt is never taken from the cache: its last token makes the logits.
        assert again["cached"] > 0 or len(prompt) <= 128
    assert sum(again["cached"] for again in served["llama"]["again"]) > 500


def test_compressed_and_dense_layers_have_their_methods(served):
    methods = served["llama"]["methods"]
    assert methods["model.layers.0.self_attn.qkv_proj"] == "PIFALinearMethod"  # k_proj is dense
    assert methods["model.layers.1.mlp.gate_up_proj"] == "PIFALinearMethod"  # up_proj is
    assert methods["model.layers.0.mlp.down_proj"] == "PIFALinearMethod"
    assert methods["model.layers.1.mlp.down_proj"] == "StreamedLinearMethod"  # on GPUs vLLM's own
    assert methods["model.embed_tokens"] == "UnquantizedEmbeddingMethod"


def test_bfloat16_is_close(served, models):
    wanted = transformers_says(models / "llama-twin", torch.bfloat16)
    pairs = [
        (a, b)
        for answer, w in zip(served["bfloat16"]["scored"], wanted, strict=True)
        for a, b in zip(answer["prompt_logprobs"], w.prompt_logprobs, strict=True)
    ]
    actual, reference = torch.tensor(pairs).T
    exact = torch.tensor([v for w in transformers_says(models / "llama-twin") for v in w.prompt_logprobs])
    # As close to float32 as transformers' own bfloat16 is, up to a factor.
    assert (actual - exact).abs().mean() < 2.0 * (reference - exact).abs().mean() + 1e-3


def assert_alike(found, expected):
    """Equal, but for the last digits of probabilities, in which two engines of vLLM differ where there is AMX."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_alike(*pair)
    else:
        assert found == expected


def test_a_plain_model_is_served_as_without_the_plugin(served, models, tmp_path):
    alone = run_engines({"plain": {"model": str(models / "llama")}}, tmp_path, VLLM_PLUGINS="")["plain"]
    assert_alike(served["plain"], alone)
    assert not any("PIFA" in method for method in alone["methods"].values())


def test_without_the_plugin_vllm_does_not_know_the_method(models, tmp_path):
    result = run_engines({"pifa": {"model": str(models / "llama-pifa")}}, tmp_path, VLLM_PLUGINS="")["pifa"]
    assert "Unknown quantization method: pifa" in result["message"]


@pytest.mark.parametrize("name", ["row", "nan", "missing", "missing-dense", "rank", "no-layer", "density"])
def test_a_spoilt_checkpoint_is_refused(name, served, models):
    _, tensor, found = spoilt_checkpoints(models)[name]
    result = served[f"spoilt-{name}"]
    assert result["error"] == "CheckpointError"
    assert tensor in result["message"]
    assert found in result["message"]
    assert "\n" not in result["message"]
