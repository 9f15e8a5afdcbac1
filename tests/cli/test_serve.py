"""What the serve command refuses before vLLM is started. Starting it is tests/server's."""

import importlib.util
import json

import pytest
from safetensors.torch import load_file, save_file

from pifa_vllm.cli import main
from pifa_vllm.cli.serve import (
    banner,
    check_model,
    check_tensor_parallel_size,
    draft_flags,
    where_to_look,
)
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from tests.edit import copy_edited
from tests.pifa_tiny import save_pifa_twin
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
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"found an empty directory.*-v \./model:"):
        check_model(str(tmp_path / "empty"))
    check_model(str(save_tiny_model(tmp_path / "dense")))
    check_model("someone/some-model")


def test_a_name_that_is_no_directory_is_said_to_be_none(tmp_path, monkeypatch):
    """Without a network, all that is heard of a mistyped directory is that a hub cannot be reached."""
    monkeypatch.chdir(tmp_path)
    assert f"There is no directory {tmp_path / 'smolm'}," in where_to_look("smolm")
    (tmp_path / "smolm").mkdir()
    assert "in the log" in where_to_look("smolm")


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    save_tiny_model(root / "dense")
    save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=lambda _, m, n: min(m, n) // 2)
    return root


def test_a_draft_for_its_dense_parent(pair):
    flag, config = draft_flags(str(pair / "pifa"), str(pair / "dense"), 3, ["--specialize-active-lora"])
    assert flag == "--speculative-config"
    assert json.loads(config) == {
        "method": "draft_model",
        "model": str(pair / "pifa"),
        "num_speculative_tokens": 3,
    }
    (_, config) = draft_flags(str(pair / "pifa"), str(pair / "dense"), None, [])
    assert json.loads(config)["num_speculative_tokens"] >= 1
    assert draft_flags(str(pair / "pifa"), None, None, ["-sc", "{}"]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pifa}", "--draft-for", "{pifa}/../pifa"], "found the same directory twice"),
        (["{pifa}", "--draft-for", "somebody/some-model"], "found 'somebody/some-model', which is none"),
        (["{pifa}", "--draft-for", "/no/such"], "/no/such: expected a model directory, found none"),
        (["/no/such", "--draft-for", "{dense}"], "/no/such: expected a model directory, found none"),
        (["{pifa}", "--draft-tokens", "2"], "--draft-tokens: expected --draft-for with it, found none"),
        (
            ["{pifa}", "--draft-for", "{dense}", "--draft-tokens", "0"],
            "--draft-tokens: expected 1 or more, found 0",
        ),
        (
            ["{pifa}", "--draft-for", "{dense}", "--speculative-config", "{{}}"],
            "expected it to be the only word on speculative decoding, found --speculative-config",
        ),
        (["{pifa}", "--draft-for", "{dense}", "-sc={{}}"], "found -sc="),
        (["{pifa}", "--draft-for", "{dense}", "--spec-tokens", "2"], "found --spec-tokens"),
    ],
)
def test_drafts_that_are_refused(arguments, message, pair, capsys):
    names = {"pifa": pair / "pifa", "dense": pair / "dense"}
    assert main(["serve", *(argument.format(**names) for argument in arguments)]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"max_position_embeddings": 256}, "max_position_embeddings: expected 512 as in {dense}, found 256"),
        ({"vocab_size": 300}, "vocab_size: expected 258 as in {dense}, found 300"),
    ],
)
def test_a_draft_of_another_model(edit, message, pair, tmp_path):
    other = copy_edited(pair / "pifa", tmp_path / "other", config=lambda config: config.update(edit))
    with pytest.raises(UnsupportedModelError) as caught:
        draft_flags(str(other), str(pair / "dense"), None, [])
    assert message.format(dense=pair / "dense") in str(caught.value)


def test_a_draft_with_another_tokenizer(pair, tmp_path):
    other = copy_edited(pair / "pifa", tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModelError, match="found another one: 2 tokens differ, first 'a'"):
        draft_flags(str(other), str(pair / "dense"), None, [])
