import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_vllm.compression.allocation import PARAMETERS, allocate, dump_recipe, kept_parameters, load_recipe
from pifa_vllm.compression.decoder import LinearShape
from pifa_vllm.compression.knapsack import allocate_by_loss, recipe_of
from pifa_vllm.errors import PifaError
from tests.compression.test_allocation import LLAMA2_7B, SMOLLM2


def falling(linears, seed=0):
    """Losses as of random spectra of different steepness and weight."""
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for linear in linears:
        k = min(linear.m, linear.n)
        weight, steepness = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        energies = weight * torch.exp(-6 * steepness * torch.arange(k, dtype=torch.float64) / k)
        tails = energies.flip(0).cumsum(0).flip(0)
        losses[linear.name] = torch.cat([tails, tails.new_zeros(1)])
    return losses


def total(ranks, linears, losses):
    return sum(float(losses[x.name][ranks[x.name]]) for x in linears if x.name in ranks)


@pytest.mark.parametrize("representation", ["pifa", "lowrank"])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("linears", [SMOLLM2, LLAMA2_7B], ids=["smollm2", "llama2-7b"])
def test_the_budget_is_spent_and_no_more_and_well(linears, density, representation):
    losses = falling(linears)
    ranks = allocate_by_loss(linears, losses, density, representation, 16)
    dense = sum(x.m * x.n for x in linears)
    assert density - 0.001 <= kept_parameters(linears, ranks, representation) / dense <= density
    assert all(rank % 16 == 0 for rank in ranks.values())
    even = allocate(linears, lambda _: density, representation, 16)
    assert total(ranks, linears, losses) < total(even, linears, losses)


SMALL = [
    LinearShape(f"m{i}", 0, "x", m, n) for i, (m, n) in enumerate([(12, 16), (16, 12), (8, 16), (12, 12)])
]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), density=st.floats(0.55, 1.0))
def test_what_it_spends_could_not_be_spent_better_by_more_than_one_step(seed, density):
    losses = falling(SMALL, seed)
    ranks = allocate_by_loss(SMALL, losses, density, "pifa", 4)
    count, budget = PARAMETERS["pifa"], density * sum(x.m * x.n for x in SMALL)
    assert kept_parameters(SMALL, ranks, "pifa") <= budget
    choices = [[r for r in (4, 8, 12) if r < min(x.m, x.n)] + [None] for x in SMALL]
    best = min(
        sum(float(losses[x.name][r]) for x, r in zip(SMALL, picked, strict=True) if r)
        for picked in itertools.product(*choices)
        if sum(count(x.m, x.n, r) if r else x.m * x.n for x, r in zip(SMALL, picked, strict=True)) <= budget
    )
    step = max(float(losses[x.name][4]) for x in SMALL)
    assert best <= total(ranks, SMALL, losses) + 1e-9 <= best + step + 1e-9


def test_a_module_without_loss_gets_least_and_one_that_matters_stays_dense():
    losses = falling(SMALL)
    losses["m0"] = torch.zeros_like(losses["m0"])
    losses["m1"] = losses["m1"] * 1e6
    ranks = allocate_by_loss(SMALL, losses, 0.8, "pifa", 4)
    assert ranks["m0"] == 4
    assert "m1" not in ranks


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(PifaError, match=r"--density: expected one that holds rank 4 .* found 0.1"):
        allocate_by_loss(SMALL, falling(SMALL), 0.1, "pifa", 4)


def test_modules_narrower_than_a_tile_get_ranks_too():
    ranks = allocate_by_loss(SMALL, falling(SMALL), 0.6, "pifa", 64)
    assert ranks
    assert all(0 < rank < 12 for rank in ranks.values())


@pytest.mark.parametrize("representation", ["pifa", "lowrank"])
@pytest.mark.parametrize("density", [0.31, 0.5, 0.77, 0.9])
def test_a_plan_gives_the_same_ranks_again_from_its_file(density, representation, tmp_path):
    ranks = allocate_by_loss(SMOLLM2, falling(SMOLLM2), density, representation, 16)
    recipe = recipe_of(SMOLLM2, ranks, representation)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    again = load_recipe(path)
    again.check(SMOLLM2)
    assert allocate(SMOLLM2, again, representation, 16) == ranks
    with pytest.raises(PifaError, match=r"recipe: it is for a model with [\d,]+ parameters"):
        again.check(LLAMA2_7B)
