"""The gradients of a staged backward pass against those of the whole model, and what follows from them."""

import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pifa_vllm.compression.decoder import MODULES, DenseModel, layer_name
from pifa_vllm.compression.flows import map_activations
from pifa_vllm.compression.lowrank import OUTPUT_RIDGE, regularised, tail_losses, whitened_svd
from pifa_vllm.compression.sensitivity import Sensitivity, draw
from pifa_vllm.errors import PifaError
from tests.compression.test_decoder import CASES
from tests.tiny import save_tiny_model

SEED = 3
RIDGE = 1e-3


def measured(directory, tokens, where, on_layer=lambda done, total: None):
    made = Sensitivity(
        DenseModel(directory),
        where,
        tokens,
        dtype=torch.float32,
        ridge=RIDGE,
        seed=SEED,
        device=torch.device("cpu"),
        keep_outputs=True,
    )
    made.measure(on_layer)
    return made


def tokens_of(samples, length):
    return torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(0))


def whole_model(directory, tokens):
    """Inputs and output gradients of every module, each [tokens, features], by autograd over the whole model."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    inputs, gradients = {}, {}

    def watch(name):
        def hook(_, arguments, output):
            inputs.setdefault(name, []).append(arguments[0][0].detach())
            output.register_hook(lambda gradient: gradients.setdefault(name, []).append(gradient[0]))

        return hook

    for layer in range(model.config.num_hidden_layers):
        for module in MODULES:
            name = layer_name(layer, module)
            model.get_submodule(name).register_forward_hook(watch(name))
    for sample, row in enumerate(tokens):
        logits = model(row[None]).logits[0]
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + sample)
        drawn = draw(logits.detach().softmax(-1), generator)
        (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
    return {n: torch.cat(x) for n, x in inputs.items()}, {n: torch.cat(x) for n, x in gradients.items()}


def test_tokens_are_drawn_by_their_probabilities():
    """Frequencies within five standard errors; what cannot be is never drawn, at the ends neither."""
    chances = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.2, 0.05, 0.0])
    count = 20_000
    drawn = draw(chances.expand(count, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (count, 1)
    found = torch.bincount(drawn[:, 0], minlength=len(chances)) / count
    error = (chances * (1 - chances) / count).sqrt()
    assert bool(((found - chances).abs() <= 5 * error).all()), found


@pytest.mark.parametrize("case", CASES)
def test_the_moments_are_those_of_the_whole_model(case, tmp_path):
    directory = save_tiny_model(tmp_path / "m", case.split("-")[0], layers=3, **CASES[case])
    tokens = tokens_of(3, 40)
    found = measured(directory, tokens, tmp_path / "s")
    inputs, gradients = whole_model(directory, tokens)
    losses, model = found.losses(), DenseModel(directory)
    for linear in model.linears():
        x, g = inputs[linear.name], gradients[linear.name]
        gram, outputs = x.T @ x / len(x), g.T @ g / len(g)
        if linear.m > linear.n:
            outputs = outputs.diagonal()
        scale = float(g.square().mean())
        torch.testing.assert_close(
            found.outputs(linear.layer)[linear.module], outputs, rtol=1e-3, atol=1e-4 * scale
        )
        wanted = tail_losses(model.shards.load(f"{linear.name}.weight"), gram, RIDGE, outputs)
        torch.testing.assert_close(losses[linear.name], wanted, rtol=1e-3, atol=1e-4 * float(wanted[0]))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24), (17, 17)])
def test_the_cut_costs_what_its_tail_says_and_nothing_costs_less(m, n, diagonal):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x, g = (torch.randn(200, k, generator=generator, dtype=torch.float64) for k in (n, m))
    gram, outputs = x.T @ x / 200, g.T @ (g * torch.logspace(0, -2, m)) / 200
    outputs = outputs.diagonal().diag() if diagonal else (outputs + outputs.T) / 2
    outer = regularised(outputs, OUTPUT_RIDGE)
    inner = regularised(gram, RIDGE)

    def loss(other):
        difference = weight - other
        return float(torch.trace(outer @ difference @ inner @ difference.T) / 2)

    if diagonal:
        outputs = outputs.diagonal()
    losses = tail_losses(weight, gram, RIDGE, outputs, OUTPUT_RIDGE)
    assert losses.shape == (min(m, n) + 1,)
    for rank in (0, 1, 9, min(m, n)):
        u, v = whitened_svd(weight, gram, rank, RIDGE, outputs)
        assert loss(u @ v) == pytest.approx(float(losses[rank]), rel=1e-6, abs=1e-9)
        if 0 < rank < min(m, n):
            plain = torch.matmul(*whitened_svd(weight, gram, rank, RIDGE))
            assert loss(u @ v) < loss(plain)
            nudged = u + 1e-3 * torch.randn(u.shape, generator=generator, dtype=torch.float64)
            assert loss(u @ v) < loss(nudged @ v)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", range(6))
def test_a_pass_that_is_stopped_goes_on_to_the_same_end(stop_at, tmp_path):
    directory = save_tiny_model(tmp_path / "m", layers=3)
    tokens = tokens_of(2, 24)

    def stop(done, total):
        assert total == 6
        if done == stop_at:
            raise _StopError

    with pytest.raises(_StopError):
        measured(directory, tokens, tmp_path / "stopped", stop)
    seen = []
    measured(directory, tokens, tmp_path / "stopped", lambda done, total: seen.append(done))
    assert seen[-1] == 6
    measured(directory, tokens, tmp_path / "whole")
    for layer in range(3):
        name = f"layer-{layer:05d}.safetensors"
        stopped, whole = (load_file(tmp_path / x / name) for x in ("stopped", "whole"))
        assert stopped.keys() == whole.keys()
        assert all(torch.equal(stopped[key], whole[key]) for key in whole)
    assert not list((tmp_path / "whole").glob("states-*"))


def test_a_file_that_is_gone_is_named(tmp_path):
    directory = save_tiny_model(tmp_path / "m", layers=3)

    def stop(done, total):
        if done == 4:
            raise _StopError

    with pytest.raises(_StopError):
        measured(directory, tokens_of(2, 24), tmp_path / "s", stop)
    os.truncate(tmp_path / "s" / "states-00001.bin", 100)
    with pytest.raises(PifaError, match=r"states-00001.bin: expected \d+ bytes, found 100. Remove"):
        measured(directory, tokens_of(2, 24), tmp_path / "s")


def test_a_result_that_is_damaged_is_named(tmp_path):
    found = measured(save_tiny_model(tmp_path / "m", layers=2), tokens_of(2, 24), tmp_path / "s")
    os.truncate(tmp_path / "s" / "layer-00001.safetensors", 100)
    for read in (found.losses, lambda: found.outputs(1)):
        with pytest.raises(PifaError, match=r"layer-00001.safetensors: cannot be read .*Remove \S+s to have"):
            read()


def test_gradients_that_overflow_name_the_module(tmp_path, monkeypatch):
    def huge(self, path):
        map_activations(path, self._shape).fill_(1e25)

    monkeypatch.setattr(Sensitivity, "_write_head_gradients", huge)
    directory = save_tiny_model(tmp_path / "m", layers=2)
    with pytest.raises(PifaError, match=r"layers\.1\.\S+: its gradients at its outputs overflow"):
        measured(directory, tokens_of(2, 24), tmp_path / "s")
