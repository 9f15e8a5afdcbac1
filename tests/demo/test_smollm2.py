"""The model that a package ships, and what happens without it."""

import importlib.util

import pytest
import torch
from transformers import AutoTokenizer

from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.demo import smollm2
from pifa_vllm.errors import PifaError


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PifaError, match=r"found no such package\. Install it with: pip install"):
        smollm2.find_gguf()


@pytest.mark.smollm2
def test_the_shipped_model_becomes_a_model_directory(tmp_path):
    smollm2.save_dense_model(tmp_path / "dense")
    model = DenseModel(tmp_path / "dense")
    assert (model.layers, model.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer.decode(tokenizer("Hello, world").input_ids) == "Hello, world"
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]
