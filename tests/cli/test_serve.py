"""What the serve command refuses before vLLM is started. Starting it is tests/server's."""

import importlib.util
import json

import pytest
from safetensors.torch import load_file, save_file

from pifa_vllm.cli import main
from pifa_vllm.cli.serve import banner, check_model, check_tensor_parallel_size
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from tests.tiny import save_tiny_model


def test_damaged_checkpoints_are_refused_at_once(twins, tmp_path, capsys):
    import shutil

    directory = tmp_path / "broken"
    shutil.copytree(twins.pifa, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.pivot_rows"][-1] = 5000
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["serve", str(directory)]) == 1
    shown = capsys.readouterr().err
    assert "model.layers.0.mlp.up_proj.pivot_rows: expected rows in [0, 112), found 5000" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/directory", "a/b/c"])
def test_missing_directories_are_not_taken_for_hub_names(name):
    with pytest.raises(CheckpointError, match="expected a model directory, found none"):
        check_model(name)


def test_dense_models_and_hub_names_pass(tmp_path):
    check_model(str(save_tiny_model(tmp_path / "dense")))
    check_model("someone/some-model")


def test_without_vllm_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["serve", "anything"]) == 1
    assert "pifa-vllm[cuda]" in capsys.readouterr().err


def test_banner_quotes_for_the_shell():
    assert '-d \'{"model": "it\'"\'"\'s"' in banner("http://localhost:1", "it's")


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "intermediate", "allowed"),
    [(2, 9, 3, 1536, "[1, 3]"), (5, 32, 8, 11008, "[1, 2, 4, 8, 16, 32]"), (4, 4, 4, 90, "[1, 2]")],
)
def test_a_tensor_parallel_size_that_the_model_does_not_allow(
    size, heads, kv_heads, intermediate, allowed, tmp_path
):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(UnsupportedModelError) as caught:
        check_tensor_parallel_size(tmp_path, size)
    assert f"to {size} ranks" in str(caught.value)
    assert allowed in str(caught.value)
    check_tensor_parallel_size(tmp_path, 1)
