"""LoRA adapters that peft made for the dense model, on PIFA layers."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pifa_vllm.errors import UnsupportedModelError
from tests.plugin.reference import answers_of, check, make_prompts
from tests.plugin.script import run_script
from tests.release import vllm_before
from tests.tiny import save_tiny_model

pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm

TOKENS = 8
PROMPTS = make_prompts([1, 3, 9, 20, 40, 70])  # the last is prefilled in two steps
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base, directory, **settings):
    """Save a random adapter for the model in `base`, strong enough to change what it says."""
    torch.manual_seed(len(directory.name))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def adapters(llamas, tmp_path_factory):
    """Name to directory; those from `narrow` on are none for this model."""
    root = tmp_path_factory.mktemp("adapters")
    names = ("all", "some", "late", "narrow", "wide", "deep", "rank", "dora", "named", "empty")
    found = {name: root / name for name in names}
    base = llamas / "first"
    save_adapter(base, found["all"], r=8, lora_alpha=16, target_modules=ALL)
    # Single members of the fused layers, dense and compressed ones, at ranks and scales of their own.
    save_adapter(
        base,
        found["some"],
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        use_rslora=True,
        rank_pattern={} if vllm_before("0.32") else {"up_proj": 6},
    )
    save_adapter(
        base,
        found["late"],
        r=2,
        lora_alpha=8,
        target_modules=["o_proj", "down_proj"],
        layers_to_transform=[1],
    )
    sizes = {
        "narrow": {"hidden": 64, "intermediate": 176},
        "wide": {"hidden": 256, "intermediate": 176},
        "deep": {"hidden": 128, "intermediate": 176, "layers": 3},
    }
    for name, size in sizes.items():
        save_adapter(save_tiny_model(root / f"{name}-base", **size), found[name], r=4, target_modules=ALL)
    save_adapter(base, found["rank"], r=32, target_modules=ALL)
    save_adapter(base, found["dora"], r=4, target_modules=ALL, use_dora=True)
    shutil.copytree(found["all"], found["named"])
    other = {"r": 8, "lora_alpha": 8, "target_modules": ["c_attn"], "peft_type": "LORA"}
    (found["named"] / "adapter_config.json").write_text(json.dumps(other))
    rename(found["named"] / "adapter_model.safetensors", "q_proj", "c_attn")
    found["empty"].mkdir()
    return found


def rename(file, old, new):
    from safetensors.torch import load_file, save_file

    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


WRONG = {
    "narrow": (
        "CheckpointError",
        "lora_B.weight: expected [128, rank] for a layer of shape [128, 176], found [64, 4]",
    ),
    "wide": ("CheckpointError", "expected [128, rank] for a layer of shape [128, 176], found [256, 4]"),
    "deep": ("CheckpointError", "found 'model.layers.2."),
    "rank": ("ValueError", "LoRA rank 32 is greater than max_lora_rank 8"),
    "dora": ("ValueError", "vLLM does not yet support DoRA"),
    "named": ("CheckpointError", "self_attn.c_attn', which is none"),
    "empty": ("LoRAAdapterNotFoundError", "No adapter found"),
}


@pytest.fixture(scope="module")
def served(llamas, adapters, tmp_path_factory):
    job = {
        "model": str(llamas / "first-pifa"),
        "adapters": {name: str(directory) for name, directory in adapters.items()},
        # As many slots as adapters in one batch: none is left empty for requests without one.
        "options": {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8},
        "batches": [["all"], ["late"], [None, "all", "some"]],
        "wrong": list(WRONG),
        "prompts": PROMPTS,
        "tokens": TOKENS,
    }
    return run_script("tests.plugin.adapted_engine", job, tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="module")
def expected(llamas, adapters):
    """What transformers and peft say on the matrices that the PIFA checkpoint stands for."""
    found = {}
    for name in ("none", "all", "some", "late"):
        model = AutoModelForCausalLM.from_pretrained(llamas / "first-twin")
        if name != "none":
            model = PeftModel.from_pretrained(model, adapters[name])
        found[name] = answers_of(model.eval(), PROMPTS, TOKENS)
    return found


def test_the_adapters_matter(expected):
    said = [[answer.tokens for answer in expected[name]] for name in expected]
    assert all(
        a != b for answers in zip(*said, strict=True) for i, a in enumerate(answers) for b in answers[:i]
    )


@pytest.mark.parametrize("name", ["all", "late"])
def test_one_adapter(name, served, expected):
    (batch,) = (batch for batch in served["batches"] if list(batch) == [name])
    check(batch[name], expected[name])


@pytest.mark.parametrize("name", ["none", "all", "some"])
def test_two_adapters_and_none_in_one_batch(name, served, expected):
    check(served["batches"][-1][name], expected[name])


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_for_another_model_is_refused(name, served, adapters):
    error, message = WRONG[name]
    assert name in served["refused"], "it was accepted"
    assert served["refused"][name][0] == error
    assert message in served["refused"][name][1]
    assert str(adapters[name]) in served["refused"][name][1] or error == "ValueError"
    assert "\n" not in served["refused"][name][1]


@pytest.mark.parametrize("name", ["none", "all", "some"])
def test_what_was_refused_leaves_nothing_behind(name, served, expected):
    check(served["afterwards"][name], expected[name])


def test_fewer_layers_and_other_bases_are_left_alone(llamas, adapters):
    from pifa_vllm.checkpoint import Checkpoint
    from pifa_vllm.plugin.lora import check_adapter

    checkpoint = Checkpoint.open(llamas / "first-pifa")
    check_adapter(adapters["late"], checkpoint)
    check_adapter(adapters["empty"], checkpoint)
    with pytest.raises(Exception, match="which is none"):
        check_adapter(strip_prefix(adapters["all"]), checkpoint)
    check_adapter(strip_prefix(adapters["all"]), checkpoint, base=True)


def test_ranks_of_single_modules_are_refused_where_vllm_passes_over_them(llamas, tmp_path):
    from pifa_vllm.plugin.lora import check_patterns

    save_adapter(llamas / "first", tmp_path / "a", r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 6})
    check_patterns(tmp_path / "a", {"r", "rank_pattern", "alpha_pattern"})
    with pytest.raises(
        UnsupportedModelError, match=r"adapter_config.json: rank_pattern: expected none, .* found"
    ):
        check_patterns(tmp_path / "a", {"r"})


def strip_prefix(adapter):
    """As peft saves an adapter of the model without its head."""
    target = adapter.with_name(f"{adapter.name}-headless")
    if not target.exists():
        shutil.copytree(adapter, target)
        rename(target / "adapter_model.safetensors", "base_model.model.model.", "base_model.model.")
    return target
