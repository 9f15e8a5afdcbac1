"""Whole runs on tiny models: what comes out, what resumes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pifa_vllm.checkpoint import Checkpoint, CheckpointWriter, is_pifa, load_tokenizer
from pifa_vllm.compression import pipeline
from pifa_vllm.compression.allocation import Recipe, load_recipe, uniform
from pifa_vllm.compression.calibration.samples import CalibrationSet
from pifa_vllm.compression.journal import lock
from pifa_vllm.compression.pipeline import Compression
from pifa_vllm.errors import CheckpointError, PifaError
from tests.compression.runs import Recorder, tiny_options, write_text
from tests.edit import copy_edited
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", layers=3)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


def compress(options):
    recorder = Recorder()
    return Compression(options, recorder).run("pifa-vllm compress ..."), recorder


def tensors_of(directory):
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("method", ["svd-llm", "mpifa-exact"])
def test_a_model_of_zeros_is_refused(method, llama, text, tmp_path):
    copy_edited(llama, tmp_path / "zeros", tensors=lambda tensors: [x.zero_() for x in tensors.values()])
    with pytest.raises(CheckpointError, match=r"zeros: expected a trained model, found .* all zero"):
        compress(tiny_options(tmp_path / "zeros", tmp_path / "out", text, method=method))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["svd", "svd-llm", "mpifa", "mpifa-exact"])
def test_every_method_gives_a_checkpoint_within_its_budget(method, llama, text, tmp_path):
    output = tmp_path / "out"
    report, recorder = compress(tiny_options(llama, output, text, method=method))
    checkpoint = Checkpoint.open(output)
    checkpoint.verify()
    assert len(checkpoint.modules) + sum(x.dense for x in report.modules) == 21
    assert 0.6 < report.density <= 0.7
    assert checkpoint.config.density == report.density
    kept = sum(x.parameters for x in checkpoint.modules.values())
    kept += sum(x.m * x.n for x in report.modules if x.dense)
    assert kept == report.kept_parameters
    assert all(x.weight_error < 1e-5 and x.max_coefficient <= 2.0 for x in report.modules)
    assert [x.layer for x in report.layers] == [0, 1, 2]
    assert recorder.named("layer done") == [0, 1, 2]
    assert len(recorder.named("module")) == 21
    saved = json.loads((output / "compression_report.json").read_text())
    assert saved["fingerprint"] == report.fingerprint == checkpoint.config.provenance["fingerprint"]
    assert not (tmp_path / "out.partial").exists()
    assert "<svg" in (output / "compression_report.html").read_text()
    assert "pifa" in (output / "README.md").read_text()
    for companion in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (output / companion).read_bytes() == (llama / companion).read_bytes()


def test_reconstruction_beats_the_baselines_on_the_flow(llama, text, tmp_path):
    """What M is for: the compressed hidden states end closer to the dense ones."""
    errors = {
        method: compress(tiny_options(llama, tmp_path / method, text, method=method))[0].layers[-1].flow_error
        for method in ("svd", "svd-llm", "mpifa", "mpifa-exact")
    }
    assert errors["mpifa"] < errors["svd-llm"] < errors["svd"]
    assert errors["mpifa-exact"] < errors["svd-llm"]


def test_chunks_of_any_size_leave_samples_for_both_folds(llama, text, tmp_path):
    """With nothing in the second fold, nothing could confirm a correction, and there would be none."""
    for name, changes in (("plain", {"mix": 0.0, "feedback": 0.0}), ("corrected", {})):
        compress(
            tiny_options(
                llama, tmp_path / name, text, method="mpifa-exact", chunk_tokens=1_000_000, **changes
            )
        )
    plain, corrected = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "corrected")
    name = "model.layers.0.mlp.down_proj.pivot_weight"
    assert not torch.allclose(plain[name], corrected[name], rtol=1e-3)


def test_density_one_is_the_dense_model(llama, text, tmp_path):
    report, _ = compress(tiny_options(llama, tmp_path / "out", text, density=uniform(1.0)))
    assert report.density == 1.0
    before, after = tensors_of(llama), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(layer.flow_error == 0.0 for layer in report.layers)


def test_reports_flow_error_is_the_models_real_error(llama, text, tmp_path):
    """The last layer's flow error, from the report, against whole-model forwards of what was written."""
    output = tmp_path / "out"
    options = tiny_options(llama, output, text)
    run = Compression(options, Recorder())
    report = run.run("test")
    from pifa_vllm.compression.calibration.samples import load_samples

    tokens = load_samples(
        str(text), load_tokenizer(llama), samples=6, length=48, seed=0, model_dir=llama
    ).tokens
    states = []
    for directory in (llama, output):
        model = AutoModelForCausalLM.from_pretrained(directory)
        captured = []
        model.model.norm.register_forward_pre_hook(lambda _, args, to=captured: to.append(args[0]))
        with torch.inference_mode():
            model(tokens)
        states.append(captured[0])
    error = float((states[1] - states[0]).norm() / states[0].norm())
    assert report.layers[-1].flow_error == pytest.approx(error, rel=1e-3)


def test_biases_recipe_and_bfloat16(qwen2, text, tmp_path):
    recipe = Recipe.model_validate(
        {"density": 0.6, "rules": [{"match": "*.k_proj", "density": 1.0}, {"layers": [1], "density": 0.9}]}
    )
    output = tmp_path / "out"
    report, _ = compress(tiny_options(qwen2, output, text, density=recipe, dtype="bfloat16"))
    checkpoint = Checkpoint.open(output)
    assert "model.layers.0.self_attn.k_proj" not in checkpoint.modules
    assert checkpoint.modules["model.layers.0.self_attn.q_proj"].has_bias
    assert checkpoint.modules["model.layers.0.self_attn.q_proj"].dtype == torch.bfloat16
    assert checkpoint.modules["model.layers.1.mlp.up_proj"].density > 0.8
    assert report.dtype == "bfloat16"
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    # bfloat16 keeps 8 bits; the bounded coefficients keep the stored form at that.
    assert all(x.weight_error < 1e-2 for x in report.modules)


def test_the_plan_of_a_run_gives_its_ranks_again(llama, text, tmp_path):
    report, recorder = compress(tiny_options(llama, tmp_path / "out", text))
    assert recorder.named("sensitivity")[-1] == 6
    assert any("nats per token lost as the gradients see it" in x for x in recorder.named("message"))
    assert report.options["allocation"] == "sensitivity"
    assert all(x.expected_loss >= 0.0 for x in report.modules)
    assert all((x.expected_loss == 0.0) == x.dense for x in report.modules)
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    again, _ = compress(tiny_options(llama, tmp_path / "again", text, density=recipe))
    assert again.options["allocation"] == "uniform"
    assert [(x.name, x.rank) for x in again.modules] == [(x.name, x.rank) for x in report.modules]
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "out").keys()


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "inputs"},
        {"allocation": "uniform"},
        {"method": "svd-llm", "metric": "outputs", "allocation": "sensitivity", "representation": "lowrank"},
        {"gradient_samples": 1},
    ],
)
def test_what_gradients_are_asked_for_is_a_choice(options, llama, text, tmp_path):
    report, _ = compress(tiny_options(llama, tmp_path / "out", text, **options))
    assert report.density <= 0.7
    assert all(x.expected_loss is not None for x in report.modules)


def test_lowrank_representation_is_an_ordinary_dense_model(llama, text, tmp_path):
    output = tmp_path / "out"
    report, _ = compress(
        tiny_options(llama, output, text, method="svd-llm", representation="lowrank", density=uniform(0.5))
    )
    assert not is_pifa(output)
    assert 0.4 < report.density <= 0.5
    model = AutoModelForCausalLM.from_pretrained(output)
    by_name = {x.name: x for x in report.modules}
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight
    assert int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5)) == by_name[name].rank < 64


def test_rank_deficient_and_zero_weights(llama, text, tmp_path):
    model = tmp_path / "deficient"
    model.mkdir()
    for path in llama.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
    thin = "model.layers.1.mlp.up_proj"
    tensors[f"{thin}.weight"].copy_(torch.randn(112, 3) @ torch.randn(3, 64))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    compress(tiny_options(model, output, text, method="svd"))
    checkpoint = Checkpoint.open(output)
    checkpoint.verify()
    assert checkpoint.modules["model.layers.0.self_attn.q_proj"].rank == 0
    # Float32 rounding of the product may leave a few directions above float64's null threshold.
    assert 3 <= checkpoint.modules[thin].rank <= 48
    dense = AutoModelForCausalLM.from_pretrained(model)
    compressed = AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.isfinite(compressed(tokens).logits).all()
        assert torch.isfinite(dense(tokens).logits).all()


def test_killed_anywhere_it_resumes_to_the_same_result(llama, text, tmp_path):
    reference, _ = compress(tiny_options(llama, tmp_path / "reference", text))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.compression.killed_runs", str(llama), str(text), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 15
    expected = tensors_of(tmp_path / "reference")
    for index, line in enumerate(lines):
        assert line["killed"], line
        assert line["resumed"], (line, done.stderr)
        # An output that is there after a kill is a whole one.
        assert line["output_after_kill"] == line["complete_after_kill"], line
        output = tmp_path / f"out-{index}"
        Checkpoint.open(output).verify()
        found = tensors_of(output)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{line}: {name}")
        report = json.loads((output / "compression_report.json").read_text())
        assert report["fingerprint"] == reference.fingerprint
        assert len(report["modules"]) == 21


def interrupted(options, monkeypatch, error):
    """Start a run whose second shard fails to be written."""
    original = CheckpointWriter.write_shard
    calls = []

    def failing(self, file, tensors):
        calls.append(file)
        if len(calls) == 2:
            raise error
        original(self, file, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_shard", failing)
        with pytest.raises(type(error)):
            compress(options)


def test_resume_starts_at_the_first_unfinished_layer(llama, text, tmp_path, monkeypatch):
    options = tiny_options(llama, tmp_path / "out", text)
    interrupted(options, monkeypatch, CheckpointError("the disk is full"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "checkpoint" / "config.json").exists()
    _, recorder = compress(options)
    assert recorder.named("layer") == [1, 2]
    assert any("resuming" in message for message in recorder.named("message"))


def test_resume_with_other_options_is_refused_by_name(llama, text, tmp_path, monkeypatch):
    options = tiny_options(llama, tmp_path / "out", text)
    interrupted(options, monkeypatch, CheckpointError("the disk is full"))
    with pytest.raises(PifaError, match=r"1 finished layers.*mix: there 1\.0, now 0\.5"):
        compress(tiny_options(llama, tmp_path / "out", text, mix=0.5))
    other_text = write_text(tmp_path / "other.txt", 5000)
    with pytest.raises(PifaError, match="tokens: there"):
        compress(tiny_options(llama, tmp_path / "out", other_text))
    other = save_tiny_model(tmp_path / "other", layers=3, seed=1)
    with pytest.raises(PifaError, match="model: there"):
        compress(tiny_options(other, tmp_path / "out", text))
    compress(options)  # and what was there was not harmed


def test_lost_activations_are_an_error_not_a_wrong_result(llama, text, tmp_path, monkeypatch):
    options = tiny_options(llama, tmp_path / "out", text)
    interrupted(options, monkeypatch, CheckpointError("the disk is full"))
    for path in (tmp_path / "out.partial" / "flows").glob("compressed-*.bin"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PifaError, match="activations entering layer 1 are missing or incomplete"):
        compress(options)


def test_a_lost_shard_is_an_error_not_a_checkpoint_without_it(llama, text, tmp_path, monkeypatch):
    options = tiny_options(llama, tmp_path / "out", text)
    interrupted(options, monkeypatch, CheckpointError("the disk is full"))
    (tmp_path / "out.partial" / "checkpoint" / "layer-00000.safetensors").unlink()
    with pytest.raises(
        PifaError, match=r"layer-00000\.safetensors: the shard of a finished layer is missing"
    ):
        compress(options)


def test_own_samples_of_another_seed_or_model_are_not_reused(llama, text, tmp_path, monkeypatch):
    drawn = []

    def draw(spec, tokenizer, *, samples, length, seed, model_dir, **_):
        if spec == "self":
            drawn.append((model_dir.name, seed))
        tokens = torch.full((samples, length), len(drawn))
        return CalibrationSet(tokens, {"source": "self", "seed": seed})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_samples", draw)
    monkeypatch.setattr(Compression, "_compress_layers", killed)
    other = save_tiny_model(tmp_path / "other", layers=3, seed=1)
    for model, seed in ((llama, 0), (llama, 0), (llama, 1), (other, 1)):
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_options(model, tmp_path / "out", "self", seed=seed))
    assert drawn == [("llama", 0), ("llama", 1), ("other", 1)]


def test_a_resumed_runs_record_is_that_of_its_samples_not_of_its_own_file(llama, text, tmp_path, monkeypatch):
    options = tiny_options(llama, tmp_path / "out", "self", samples=2, length=16)
    interrupted(options, monkeypatch, CheckpointError("the disk is full"))
    report, recorder = compress(options)
    assert recorder.named("layer") == [1, 2]
    assert report.calibration["source"] == "self"
    assert "tokens_file" not in report.calibration


def test_a_recipes_rule_about_nothing_is_refused_at_once(llama, text, tmp_path):
    recipe = Recipe.model_validate({"density": 0.6, "rules": [{"layers": [7], "density": 0.9}]})
    with pytest.raises(PifaError, match=r"rules\.0: expected modules that match '\*' in layers \[7\]"):
        compress(tiny_options(llama, tmp_path / "out", text, density=recipe))
    assert not (tmp_path / "out.partial").exists()


def test_a_second_process_is_kept_out(llama, text, tmp_path):
    options = tiny_options(llama, tmp_path / "out", text)
    (tmp_path / "out.partial").mkdir()
    with lock(tmp_path / "out.partial"), pytest.raises(PifaError, match="another process"):
        compress(options)


def test_bad_input_is_refused_before_work_starts(llama, text, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(PifaError, match="there: the output directory exists"):
        compress(tiny_options(llama, tmp_path / "there", text))
    with pytest.raises(PifaError, match="--length: expected at most the model's 512 positions, found 1024"):
        compress(tiny_options(llama, tmp_path / "out", text, length=1024))
    with pytest.raises(PifaError, match="--device: expected a device that torch can use, found 'abacus'"):
        compress(tiny_options(llama, tmp_path / "out", text, device="abacus"))
    with pytest.raises(PifaError, match="keeps nothing at density 1e-06"):
        compress(tiny_options(llama, tmp_path / "out", text, density=uniform(1e-6)))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/out\.partial: cannot be written"):
        compress(tiny_options(llama, tmp_path / "file" / "out", text))
    with pytest.raises(PifaError, match="--samples: expected 1 or more, found 0"):
        tiny_options(llama, tmp_path / "out", text, samples=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(PifaError, match=r"GiB of disk, but 0\.0 GiB are free"):
        compress(tiny_options(llama, tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_by_name(llama, text, tmp_path):
    model = tmp_path / "nan"
    model.mkdir()
    for path in llama.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*1 NaN or infinite"):
        compress(tiny_options(model, tmp_path / "out", text))
    assert not (tmp_path / "out").exists()
