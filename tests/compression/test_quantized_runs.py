"""Whole runs whose factors are quantized, of dense models and of PIFA checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pifa_vllm.bench.quality.cost import cost
from pifa_vllm.checkpoint import Checkpoint, densify
from pifa_vllm.compression.allocation import Recipe, uniform
from pifa_vllm.compression.options import FACTORS
from pifa_vllm.compression.pipeline import Compression
from pifa_vllm.errors import CheckpointError, PifaError
from tests.compression.runs import Recorder, tiny_options, write_text
from tests.compression.test_pipeline import interrupted
from tests.tiny import save_tiny_model

RECIPE = Recipe.model_validate(
    {"density": 0.7, "rules": [{"match": "*.k_proj", "density": 1.0}, {"layers": [1], "density": 0.9}]}
)
TOKENS = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """It has biases."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def plain(qwen2, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "out"
    run(tiny_options(qwen2, output, text, density=RECIPE))
    return output


def run(options):
    return Compression(options, Recorder()).run("pifa-vllm ...")


def quantize(model, output, text, kind, **settings):
    density = uniform(Checkpoint.open(model).config.density)
    return run(
        tiny_options(model, output, text, method="quantize", density=density, factors=kind, **settings)
    )


@torch.inference_mode()
def logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits.float()


@pytest.mark.parametrize("kind", FACTORS.values(), ids=list(FACTORS))
def test_a_dense_model_becomes_one_that_computes_what_its_factors_stand_for(kind, qwen2, text, tmp_path):
    output = tmp_path / "out"
    report = run(tiny_options(qwen2, output, text, density=RECIPE, factors=kind))
    checkpoint = Checkpoint.open(output)
    checkpoint.verify()
    assert checkpoint.config.factors == kind
    assert checkpoint.config.format_version == 2
    densify(output, tmp_path / "dense")
    # Activations are rounded to 16 bits on CPUs.
    torch.testing.assert_close(logits(output), logits(tmp_path / "dense"), rtol=1e-2, atol=1e-2)
    of_linear = cost(output, None)["bytes"] - 4 * sum(x.rank for x in checkpoint.modules.values())
    assert report.kept_bytes == of_linear
    assert report.kept_bytes < 0.32 * report.kept_parameters * 4
    assert "quantized to" in (output / "README.md").read_text()
    assert all(0 < x.weight_error < (0.2 if kind.bits == 4 else 0.1) for x in report.modules)


def test_without_factors_the_first_version_is_written(plain):
    section = json.loads((plain / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == 1
    assert "factors" not in section
    assert section["provenance"]["options"]["factors"] is None


@pytest.mark.parametrize("kind", FACTORS.values(), ids=list(FACTORS))
def test_a_checkpoint_keeps_its_ranks_and_pivots(kind, plain, text, tmp_path):
    output = tmp_path / "out"
    report = quantize(plain, output, text, kind)
    before, after = Checkpoint.open(plain), Checkpoint.open(output)
    after.verify()
    assert after.config.ranks == before.config.ranks
    assert report.density == before.config.density
    assert after.config.provenance["source"] == before.config.provenance
    for name in before.modules:
        if after.modules[name].pivots == "pivot_rows":
            assert torch.equal(after.pivots(name), before.pivots(name))
        wanted, found = before.load(name).dense(), after.load(name).dense()
        assert float((found - wanted).norm()) < (0.25 if kind.bits == 4 else 0.1) * float(wanted.norm())
    wanted = logits(plain).log_softmax(-1)
    lost = (wanted.exp() * (wanted - logits(output).log_softmax(-1))).sum(-1).mean()
    other = (wanted.exp() * (wanted - wanted.roll(1, dims=1))).sum(-1).mean()
    assert float(lost) < (0.3 if kind.bits == 4 else 0.1) * float(other)


def test_a_run_that_is_interrupted_goes_on(plain, text, tmp_path, monkeypatch):
    density = uniform(Checkpoint.open(plain).config.density)
    options = [
        tiny_options(
            plain, tmp_path / name, text, method="quantize", density=density, factors=FACTORS["int8"]
        )
        for name in ("whole", "parts")
    ]
    run(options[0])
    interrupted(options[1], monkeypatch, CheckpointError("the disk is full"))
    assert not (tmp_path / "parts").exists()
    run(options[1])
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        other = load_file(tmp_path / "parts" / path.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(path).items())


def test_bad_input_is_refused_at_once(plain, qwen2, text, tmp_path):
    quantize(plain, tmp_path / "int8", text, FACTORS["int8"])
    with pytest.raises(PifaError, match="found quantized ones"):
        quantize(tmp_path / "int8", tmp_path / "out", text, FACTORS["int4"])
    with pytest.raises(CheckpointError, match="not a PIFA checkpoint"):
        run(tiny_options(qwen2, tmp_path / "out", text, method="quantize", factors=FACTORS["int8"]))
    with pytest.raises(PifaError, match="expected --factors"):
        tiny_options(plain, tmp_path / "out", text, method="quantize")
    with pytest.raises(PifaError, match="expected --representation pifa, found lowrank"):
        tiny_options(qwen2, tmp_path / "out", text, factors=FACTORS["int8"], representation="lowrank")
