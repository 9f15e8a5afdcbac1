"""Chunked comparison with the dense model against the plain one over whole logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from pifa_vllm import loading
from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.comparison import Reference
from pifa_vllm.evaluate.perplexity import perplexity
from tests.conftest import Twins
from tests.tiny import save_tiny_model

TEXT = "".join(chr(32 + (7 * i * i + i) % 90) for i in range(420))


def plain(dense: Path, other: Path) -> list[tuple[float, float, float]]:
    """NLL, KL and agreement of each window of 100 tokens, by torch's own functions."""
    models = [AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (dense, other)]
    ids = torch.tensor(load_tokenizer(dense)(TEXT)["input_ids"])
    rows = []
    with torch.inference_mode():
        for window in ids[:400].view(4, 100):
            p, q = (model(window[None]).logits[0, :-1].log_softmax(dim=1) for model in models)
            same = (p.argmax(dim=1) == q.argmax(dim=1)).float().mean()
            kl = kl_div(q, p, log_target=True, reduction="batchmean")
            rows.append((float(cross_entropy(q, window[1:])), float(kl), float(same)))
    return rows


def reference(dense: Path, cache: Path) -> Reference:
    return Reference(dense, TEXT, seqlen=100, max_windows=None, cache=cache)


@pytest.mark.parametrize("held", [258 * 7, 2**24])
def test_the_figures_are_those_of_whole_logits(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(loading, "_LOGITS", held)
    found = reference(twins.original, tmp_path).compare(twins.pifa)
    nll, kl, top1 = zip(*plain(twins.original, twins.dense), strict=True)
    assert found.nll == pytest.approx(nll, rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.top1 == pytest.approx(top1, abs=0.011)  # one token of 99, where two are as likely
    assert min(found.kl) > 0.01
    assert max(found.top1) < 1.0


def test_the_dense_model_is_itself_and_runs_once(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reference(twins.original, tmp_path).compare(None)
    assert found.nll == pytest.approx(perplexity(twins.original, TEXT, seqlen=100).window_nlls, rel=1e-6)
    assert (found.kl, found.top1) == ((0.0,) * 4, (1.0,) * 4)
    monkeypatch.setattr(Reference, "_keep", lambda *_: pytest.fail("the window is there already"))
    assert reference(twins.original, tmp_path).compare(None) == found


def test_what_happens_after_the_head_counts(tmp_path: Path) -> None:
    dense = save_tiny_model(tmp_path / "dense", "granite", logits_scaling=0.25)
    other = save_tiny_model(tmp_path / "other", "granite", logits_scaling=0.25, seed=1)
    found = reference(dense, tmp_path).compare(other)
    nll, kl, _ = zip(*plain(dense, other), strict=True)
    assert found.nll == pytest.approx(nll, rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-4)


def test_another_vocabulary_is_refused(twins: Twins, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(EvaluationError, match=r"expected the vocabulary of .*, 258 tokens, found 300"):
        reference(twins.original, tmp_path).compare(other)
