"""What vLLM's users expect of an engine, on a PIFA checkpoint and on the matrices that it stands for."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.plugin.reference import answers_of, check, make_prompts
from tests.plugin.script import run_script
from tests.release import vllm_before

pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm
speculates = pytest.mark.skipif(vllm_before("0.32"), reason="vLLM's speculation does not run on CPUs")

TOKENS = 24
# Two begin alike over more than a block of the KV cache, and one repeats itself, for n-grams to be found.
LONG = make_prompts([180])[0]
PROMPTS = [*make_prompts([1, 5, 33]), LONG, [*LONG[:160], 7, 8, 9], [256, *[3, 4, 5, 6] * 12]]
REFUSED = {
    "dummy": ({"load_format": "dummy"}, "--load-format dummy: expected a format that reads"),
    "sharded": (
        {"load_format": "sharded_state"},
        "--load-format sharded_state: expected a format that reads",
    ),
    "pickles": ({"load_format": "pt"}, "--load-format pt: expected a format that reads"),
    "bitsandbytes": ({"load_format": "bitsandbytes"}, "Load format `bitsandbytes` is not supported"),
    "fp8": ({"quantization": "fp8"}, "(pifa) does not match the quantization method"),
    "bnb": ({"quantization": "bitsandbytes"}, "(pifa) does not match the quantization method"),
    "online": ({"quantization_config": {"linear": "fp8_per_tensor"}}, "quantized while they are loaded"),
    "experts": ({"enable_expert_parallel": True}, "Number of experts in the model must be greater than 0"),
}


WAYS = {
    "bfloat16": {"dtype": "bfloat16"},
    "transformers": {"model_impl": "transformers"},
    "offloaded": {"cpu_offload_gb": 1},
}


@pytest.fixture(scope="module")
def used(llamas, tmp_path_factory):
    job = {
        "models": {"pifa": str(llamas / "first-pifa"), "dense": str(llamas / "first-twin")},
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "ways": WAYS,
        "drafts": not vllm_before("0.32"),
        "refused": {name: options for name, (options, _) in REFUSED.items()},
    }
    return run_script("tests.plugin.featured_engines", job, tmp_path_factory.mktemp("used"))


@pytest.fixture(scope="module")
def model(llamas):
    return AutoModelForCausalLM.from_pretrained(llamas / "first-twin").eval()


@pytest.fixture(scope="module")
def expected(model):
    return answers_of(model, PROMPTS, TOKENS)


@pytest.mark.parametrize(
    "way", ["plain", "cached", "transformers", "offloaded", pytest.param("drafting", marks=speculates)]
)
def test_answers(way, used, expected):
    check(used["pifa"][way], expected)


def test_the_prefix_cache_is_used(used):
    cached = [answer["cached"] for answer in used["pifa"]["cached"]]
    assert cached == [answer["cached"] for answer in used["dense"]["cached"]]
    assert sum(cached) >= 256  # two blocks


@speculates
def test_n_grams_are_accepted(used):
    assert used["pifa"]["accepted"] > 0


def test_the_best_tokens_have_the_same_logprobs(used):
    for ours, dense in zip(used["pifa"]["logprobs"], used["dense"]["logprobs"], strict=True):
        for step, wanted in zip(ours, dense, strict=True):
            assert len(step) >= 5
            assert step == pytest.approx(wanted, abs=1e-3)


@torch.inference_mode()
def test_embeddings_are_the_last_hidden_states(used, model):
    for prompt, found in zip(PROMPTS, used["pifa"]["embeddings"], strict=True):
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]  # [hidden]
        wanted = torch.nn.functional.normalize(hidden, dim=-1)
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-4)


def test_bfloat16_says_nearly_the_same(used, expected):
    answers = used["pifa"]["bfloat16"]
    same = [a["tokens"][0] == wanted.tokens[0] for a, wanted in zip(answers, expected, strict=True)]
    assert sum(same) >= len(same) - 1
    first = [(a["logprobs"][0], w.logprobs[0]) for a, w in zip(answers, expected, strict=True)]
    assert sum(abs(a - b) for a, b in first) / len(first) < 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name, used):
    assert name in used["refused"], "it was accepted"
    assert REFUSED[name][1] in used["refused"][name][1]


def test_speculation_is_refused_where_vllm_cannot(monkeypatch):
    from vllm.platforms import current_platform

    from pifa_vllm.errors import UnsupportedModelError
    from pifa_vllm.plugin import engine

    if not current_platform.is_cpu():
        pytest.skip("vLLM's speculation runs here")
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    settings = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"), speculative_config="any")
    with pytest.raises(
        UnsupportedModelError, match=r"--speculative-config: vLLM .* cannot verify drafts on CPUs"
    ):
        engine.prepare(None, settings, drafts=False)


def test_a_newer_format_is_refused(llamas, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    from tests.edit import copy_edited

    newer = copy_edited(
        llamas / "first-pifa",
        tmp_path / "newer",
        config=lambda config: config["quantization_config"].update(format_version=3),
    )
    with pytest.raises(Exception, match=r"format_version 3, expected at most 2\. Update pifa-vllm"):
        EngineArgs(model=str(newer)).create_engine_config()
