"""The chunked evaluation against the plain one, and its refusal of models and texts that give no figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pifa_vllm import loading
from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.perplexity import perplexity
from tests.conftest import Twins
from tests.tiny import save_tiny_model

TEXT = "".join(chr(32 + (7 * i * i + i) % 90) for i in range(1000))


def plain(directory: Path, seqlen: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Window means by the model's own logits and torch's cross entropy."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    ids = torch.tensor(load_tokenizer(directory)(TEXT)["input_ids"])
    with torch.inference_mode():
        return [
            float(cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]))
            for window in ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
        ]


@pytest.mark.parametrize("held", [1, 258 * 7, 2**24])
def test_chunks_give_the_plain_figure(twins: Twins, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(loading, "_LOGITS", held)
    found = perplexity(twins.dense, TEXT, seqlen=100)
    assert found.window_nlls == pytest.approx(plain(twins.dense, 100), rel=1e-5)
    assert found.windows == 10
    assert (found.engine, found.dtype, found.seqlen) == ("transformers", "float32", 100)


def test_what_happens_after_the_head_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny_model(tmp_path / "granite", "granite", logits_scaling=0.25)
    monkeypatch.setattr(loading, "_LOGITS", 258 * 7)
    assert perplexity(directory, TEXT, seqlen=100).window_nlls == pytest.approx(
        plain(directory, 100), rel=1e-5
    )


def test_pifa_layers_give_the_figure_of_the_dense_weights(twins: Twins) -> None:
    by_layers, by_weights = (perplexity(d, TEXT, seqlen=128) for d in (twins.pifa, twins.dense))
    assert by_layers.nll == pytest.approx(by_weights.nll, abs=1e-5)
    assert by_layers.nll != pytest.approx(perplexity(twins.original, TEXT, seqlen=128).nll, abs=1e-2)


def test_a_loaded_model_brings_its_tokenizer(twins: Twins) -> None:
    model = AutoModelForCausalLM.from_pretrained(twins.pifa).train()
    steps: list[tuple[int, int]] = []
    found = perplexity(model, TEXT, seqlen=300, progress=lambda done, total: steps.append((done, total)))
    assert found.window_nlls == perplexity(twins.pifa, TEXT, seqlen=300).window_nlls
    assert found.model == str(twins.pifa)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert perplexity(model, TEXT, seqlen=300, max_windows=2).window_nlls == found.window_nlls[:2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_models_still_get_a_float32_softmax(twins: Twins, dtype: str) -> None:
    found = perplexity(twins.dense, TEXT, seqlen=250, dtype=dtype)
    assert found.dtype == dtype
    assert found.window_nlls == pytest.approx(plain(twins.dense, 250, getattr(torch, dtype)), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("window", "position"), [(0, 0), (2, 57), (1, 98)])
def test_logits_that_are_not_finite_are_an_error(
    twins: Twins, monkeypatch: pytest.MonkeyPatch, value: float, window: int, position: int
) -> None:
    monkeypatch.setattr(loading, "_LOGITS", 258 * 10)
    model = AutoModelForCausalLM.from_pretrained(twins.pifa)
    calls = 0

    def spoil(_: object, __: object, output: Any) -> None:
        nonlocal calls
        if calls == window:
            output.last_hidden_state[0, position, 3] = value
        calls += 1

    model.base_model.register_forward_hook(spoil)
    with pytest.raises(EvaluationError, match=rf"pifa: window {window}, position {position}: the logits"):
        perplexity(model, TEXT, seqlen=100)


def test_too_long_windows(twins: Twins) -> None:
    with pytest.raises(
        EvaluationError, match=r"dense: windows of 513 tokens .* max_position_embeddings is 512"
    ):
        perplexity(twins.dense, TEXT, seqlen=513)
