"""The loss and its gradient, the choice of parameters, and the learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from pifa_vllm import loading
from pifa_vllm.healing import distillation
from pifa_vllm.healing.distillation import Distillation, divergence, rate, trained_parameters
from pifa_vllm.loading import load
from tests.healing.tiny_heal import Family, tiny_heal

TOKENS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))


def test_the_divergence_and_its_gradient_are_autograds() -> None:
    logits, goal = (torch.randn(5, 30, dtype=torch.float64) * 3 for _ in range(2))
    logits.requires_grad_()
    expected = kl_div(log_softmax(logits, -1), log_softmax(goal, -1), reduction="sum", log_target=True)
    expected.backward()
    loss, gradient = divergence(logits.detach(), goal)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=1e-4, atol=1e-6)
    assert divergence(goal, goal)[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("logits_at_once", [258 * 7, 2**24])
def test_pieces_of_any_size_give_the_models_own_gradients(
    family: Family, monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    """Against one backward pass of transformers' own logits, the tied embedding's two roles included."""
    monkeypatch.setattr(loading, "_LOGITS", logits_at_once)
    found = Distillation(tiny_heal(family, Path("unused"), embeddings=True))
    student, teacher = load(family.pifa, dtype="float32"), load(family.dense)
    with torch.no_grad():
        goal = teacher(TOKENS[[2, 0]]).logits.log_softmax(-1).flatten(0, 1)
    ours = student(TOKENS[[2, 0]]).logits.log_softmax(-1).flatten(0, 1)
    expected = kl_div(ours, goal, reduction="batchmean", log_target=True)
    expected.backward()
    assert found._loss(TOKENS, [2, 0], "train", backward=True) == pytest.approx(expected.item(), rel=1e-4)
    parameters = dict(student.named_parameters())
    for name, parameter in found.parameters.items():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-3, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients(family: Family) -> None:
    plain, recomputed = (
        Distillation(tiny_heal(family, Path("unused"), gradient_checkpointing=x)) for x in (False, True)
    )
    for found in (plain, recomputed):
        found._student.train()
        found._loss(TOKENS, [0, 1], "train", backward=True)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(recomputed.parameters[name].grad, parameter.grad)


def test_the_teachers_states_are_kept_as_far_as_memory_goes(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_KEPT_BYTES", 2 * 48 * 64 * 4)
    found = Distillation(tiny_heal(family, Path("unused")))
    first = [found.held_out(TOKENS), found.held_out(TOKENS)]
    assert first[0] == first[1]
    assert len(found._states) == 2


def test_what_is_trained(family: Family) -> None:
    model = load(family.pifa)
    chosen = trained_parameters(model, embeddings=False)
    assert all(x.requires_grad == (name in chosen) for name, x in model.named_parameters())
    kinds = {name.rpartition(".")[2] for name in chosen if "norm" not in name}
    # k_proj stays dense in this family, and is trained all the same.
    assert kinds == {"pivot_weight", "coefficients", "weight"}
    assert {x.split(".")[-2] for x in chosen if x.endswith("_proj.weight")} == {"k_proj"}
    assert {x for x in chosen if "norm" in x} == {x for x, _ in model.named_parameters() if "norm" in x}
    more = trained_parameters(model, embeddings=True)
    assert more.keys() - chosen.keys() == {"model.embed_tokens.weight"}


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[9] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.0 < rates[-1] < 0.01
    assert rate(0, 1, 0.0) == 1.0
