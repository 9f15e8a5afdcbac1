"""Other weights in a running engine: those of the new checkpoint, or an error and those that were there."""

import pytest
from transformers import AutoModelForCausalLM

from tests.edit import copy_edited
from tests.plugin.reference import answers_of, check, make_prompts
from tests.plugin.script import run_script
from tests.release import vllm_before

pytest.importorskip("vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        vllm_before("0.32"),
        reason="before 0.32 vLLM's runners keep their load format, so nothing is checked before a reload",
    ),
]

TOKENS = 8
PROMPTS = make_prompts([1, 3, 9, 20, 40, 70])
LAYER = "model.layers.1.self_attn.o_proj"
REFUSED = {
    "ranks": f"ranks['{LAYER}']: expected 90, found 87",
    "missing": f"tensor {LAYER}.coefficients is missing",
    "damaged": f"tensor {LAYER}.coefficients: expected finite values, found 1 NaN",
    "out of range": f"tensor {LAYER}.pivot_rows: expected rows in [0, 128), found 128",
    "vocabulary": "tensor model.embed_tokens.weight: expected [258, 128], found [257, 128]",
    "dense": "not a PIFA checkpoint",
    "nowhere": "nowhere",
}


@pytest.fixture(scope="module")
def refused(llamas, tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")

    def put(tensor, value):
        return {"tensors": lambda tensors: tensors[tensor].view(-1).__setitem__(-1, value)}

    def shorten(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()

    edits = {
        "missing": {"tensors": lambda tensors: tensors.pop(f"{LAYER}.coefficients")},
        "damaged": put(f"{LAYER}.coefficients", float("nan")),
        "out of range": put(f"{LAYER}.pivot_rows", 128),
        "vocabulary": {"tensors": shorten, "config": lambda config: config.update(vocab_size=257)},
    }
    for name, edit in edits.items():
        copy_edited(llamas / "second-pifa", root / name, **edit)
    found = {name: str(root / name) for name in REFUSED}
    return {**found, "ranks": str(llamas / "other-pifa"), "dense": str(llamas / "second-twin")}


@pytest.fixture(scope="module")
def reloaded(llamas, refused, tmp_path_factory):
    job = {
        "model": str(llamas / "first-pifa"),
        "second": str(llamas / "second-pifa"),
        "refused": refused,
        "damaged": f"{LAYER}.coefficients",
        "options": {"enforce_eager": False},
        "prompts": PROMPTS,
        "tokens": TOKENS,
    }
    return run_script("tests.plugin.reloaded_engine", job, tmp_path_factory.mktemp("reloaded"))


@pytest.fixture(scope="module")
def expected(llamas):
    return {
        name: answers_of(AutoModelForCausalLM.from_pretrained(llamas / f"{name}-twin"), PROMPTS, TOKENS)
        for name in ("first", "second")
    }


def test_the_models_differ(expected):
    pairs = zip(expected["first"], expected["second"], strict=True)
    assert all(a.tokens != b.tokens for a, b in pairs)


def test_it_says_what_the_weights_say(reloaded, expected):
    for name in ("first", "first again", "first from tensors"):
        check(reloaded[name], expected["first"])
    check(reloaded["second"], expected["second"])


def test_sleep_does_nothing_on_cpus(reloaded, expected):
    check(reloaded["after sleep"], expected["first"])


def test_what_does_not_fit_is_refused_before_anything_is_lost(reloaded, expected):
    for name, message in REFUSED.items():
        assert name in reloaded, f"{name} was accepted"
        kind, found = reloaded[name]
        assert message in found, f"{name}: {kind}: {found}"
    check(reloaded["after refusals"], expected["first"])
    assert "without a path" not in reloaded
    check(reloaded["after that"], expected["first"])


def test_tensors_that_fail_midway_end_the_engines_use(reloaded):
    kind, message = reloaded["damaged tensors"]
    assert kind == "CheckpointError"
    assert f"tensor {LAYER}.coefficients (torch.float32): expected finite values" in message
    kind, message = reloaded["after damage"]
    assert kind == "CheckpointError"
    assert "start another engine" in message
    assert f"{LAYER}.coefficients" in message


def test_sleep_mode_is_refused_on_cpus(llamas):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's sleep mode works here")
    arguments = EngineArgs(model=str(llamas / "first-pifa"), enable_sleep_mode=True)
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        arguments.create_engine_config()
