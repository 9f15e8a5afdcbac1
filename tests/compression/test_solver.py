"""One module at a time: what is stored is what the compressed flow goes on with, and the report is true of it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pifa_vllm.compression.allocation import uniform
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.moments import Moments
from pifa_vllm.compression.options import FACTORS, CompressOptions
from pifa_vllm.compression.solver import LayerSolver
from pifa_vllm.errors import PifaError
from pifa_vllm.factorization import PIFA, pifa_parameters
from tests.tiny import save_tiny_model

UP = "mlp.up_proj"
NAME = f"model.layers.1.{UP}"
Q = "self_attn.q_proj"


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    model = DenseModel(save_tiny_model(tmp_path_factory.mktemp("solver") / "qwen2", "qwen2"))
    return model.layer_twice(1, torch.device("cpu"))[0]


@pytest.fixture
def moments():
    """Of 600 correlated inputs of 64 features, the compressed flow's a little off the dense one's."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1, 64)
    dense = torch.randn(600, 64, generator=generator) @ mixing
    compressed = dense + 0.05 * torch.randn(600, 64, generator=generator)
    found = Moments(64, torch.device("cpu"), folds=2)
    for half in (slice(0, 300), slice(300, 600)):
        found.add(dense[half], compressed[half])
    return found


def solver_of(layer, ranks, dtype=torch.float32, outputs=None, **changes):
    options = CompressOptions(model=Path("model"), output=Path("out"), density=uniform(0.5))
    told = []
    made = LayerSolver(
        dataclasses.replace(options, **changes), 1, layer, ranks, outputs, dtype, {}, None, told.append
    )
    return made, told


@pytest.mark.parametrize("method", ["svd-llm", "mpifa-exact"])
def test_the_outputs_metric_spares_what_the_loss_feels(layer, moments, method):
    """Where the loss looks at a few outputs alone, these come out better, and the others worse."""
    weight = layer.linears[UP].weight
    felt = torch.zeros(len(weight))
    felt[:8] = 1.0
    solver, _ = solver_of(layer, {NAME: 24}, method=method)
    plain = solver(UP, weight, moments)
    solver, _ = solver_of(layer, {NAME: 24}, method=method, outputs={UP: torch.diag(1e3 * felt)})
    aimed = solver(UP, weight, moments)
    errors = [(x - weight).square().sum(1) for x in (plain, aimed)]
    assert errors[1][:8].sum() < 0.7 * errors[0][:8].sum()
    assert errors[1][8:].sum() > errors[0][8:].sum()


@pytest.mark.parametrize("method", ["svd", "svd-llm", "mpifa", "mpifa-exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_flow_goes_on_through_what_is_stored(layer, moments, method, dtype):
    solver, told = solver_of(layer, {NAME: 24}, dtype, method=method)
    weight = layer.linears[UP].weight
    used = solver(UP, weight, moments)
    assert (used.dtype, used.shape) == (torch.float32, weight.shape)
    factors = PIFA(*(solver.tensors[f"{NAME}.{x}"] for x in ("pivot_weight", "coefficients", "pivot_rows")))
    assert factors.pivot_weight.dtype == factors.coefficients.dtype == dtype
    torch.testing.assert_close(used, factors.to(torch.float64).dense().float(), rtol=0, atol=0)
    (report,) = told
    assert solver.reports == told
    assert (report.name, report.layer, report.kind, report.rank, report.dense) == (
        NAME,
        1,
        "up_proj",
        24,
        False,
    )
    assert report.density == pifa_parameters(112, 64, 24) / (112 * 64)
    gram = moments.gram()
    difference = (weight - used).double()
    expected = torch.trace(difference @ gram @ difference.T) / torch.trace(
        weight.double() @ gram @ weight.double().T
    )
    assert report.output_error == pytest.approx(float(expected) ** 0.5, rel=1e-5)
    assert 0.0 < report.output_error < 0.6
    assert report.weight_error < (1e-6 if dtype == torch.float32 else 1e-2)
    assert 0.0 < report.max_coefficient <= 1.06


def test_more_rank_is_less_error_and_full_information_is_none(layer, moments):
    weight = layer.linears[UP].weight
    errors = []
    for rank in (8, 24, 48, 63):
        solver, told = solver_of(layer, {NAME: rank}, method="svd-llm")
        solver(UP, weight, moments)
        errors.append(told[0].output_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_a_module_without_a_rank_stays_dense_with_its_bias(layer, moments):
    solver, (told) = solver_of(layer, {}, torch.bfloat16)
    weight = layer.linears[Q].weight
    used = solver(Q, weight, moments)
    assert torch.equal(used, weight.bfloat16().float())
    name = f"model.layers.1.{Q}"
    assert solver.tensors.keys() == {f"{name}.weight", f"{name}.bias"}
    assert torch.equal(solver.tensors[f"{name}.weight"], weight.bfloat16())
    assert torch.equal(solver.tensors[f"{name}.bias"], layer.linears[Q].bias.bfloat16())
    (report,) = told
    assert (report.dense, report.rank, report.density, report.output_error) == (True, 64, 1.0, 0.0)


def test_low_rank_is_stored_multiplied_out_and_counted_as_two_factors(layer, moments):
    name = f"model.layers.1.{Q}"
    solver, told = solver_of(layer, {name: 16}, method="svd-llm", representation="lowrank")
    used = solver(Q, layer.linears[Q].weight, moments)
    assert solver.tensors.keys() == {f"{name}.weight", f"{name}.bias"}
    assert torch.equal(solver.tensors[f"{name}.weight"], used)
    assert int(torch.linalg.matrix_rank(used.double(), rtol=1e-5)) == 16
    assert told[0].density == 16 * (64 + 64) / 64**2
    assert told[0].max_coefficient == 0.0


def test_the_exact_method_reaches_the_least_error_of_its_target(layer, moments):
    """Without mix the target is WX, and nothing of rank r is nearer to it than the whitened SVD."""
    weight = layer.linears[UP].weight
    errors = {}
    for method in ("svd", "svd-llm", "mpifa", "mpifa-exact"):
        solver, told = solver_of(layer, {NAME: 16}, method=method, mix=0.0, feedback=0.0, ridge=1e-9)
        solver(UP, weight, moments)
        errors[method] = told[0].output_error
    assert errors["mpifa-exact"] == pytest.approx(errors["svd-llm"], rel=1e-3)
    assert errors["svd-llm"] <= errors["mpifa"] * (1 + 1e-6)
    assert errors["svd-llm"] < 0.98 * errors["svd"]


def test_feedback_undoes_what_the_inputs_tell_of_the_streams_error(layer):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(600, 64, generator=generator)
    lost = 0.3 * x @ torch.randn(64, 64, generator=generator)
    collected = Moments(64, torch.device("cpu"), stream=64, folds=2)
    for half in (slice(0, 300), slice(300, 600)):
        collected.add(x[half], x[half], lost[half])
    weight = layer.linears["self_attn.o_proj"].weight
    errors = {}
    for feedback in (0.0, 0.5, 1.0):
        solver, _ = solver_of(
            layer, {"model.layers.1.self_attn.o_proj": 56}, method="mpifa-exact", feedback=feedback
        )
        used = solver("self_attn.o_proj", weight, collected)
        errors[feedback] = float((x @ weight.T + lost - x @ used.T).norm() / lost.norm())
    assert errors[1.0] < errors[0.5] < errors[0.0]
    assert errors[0.0] > 0.9
    assert errors[1.0] < 0.2


def test_a_module_of_less_rank_than_it_was_given_reports_its_own(layer, moments):
    solver, told = solver_of(layer, {NAME: 24}, method="svd")
    generator = torch.Generator().manual_seed(1)
    # In float64, or rounding of the product would fill up the rank.
    weight = torch.zeros(112, 64)
    weight[:5] = torch.randn(5, 64, generator=generator)
    used = solver(UP, weight, moments)
    assert told[0].rank == solver.tensors[f"{NAME}.pivot_weight"].shape[0] == 5
    assert told[0].density == pifa_parameters(112, 64, 5) / (112 * 64)
    torch.testing.assert_close(used, weight)


def test_inputs_that_overflow_are_named(layer):
    broken = Moments(64, torch.device("cpu"))
    states = torch.full((4, 64), 1e30)
    broken.add(states, states)
    solver, told = solver_of(layer, {NAME: 24})
    with pytest.raises(PifaError, match=rf"{NAME}: its calibration inputs overflow float32"):
        solver(UP, layer.linears[UP].weight, broken)
    assert told == []
    assert solver.tensors == {}


def test_a_solution_that_does_not_fit_the_dtype_is_named(layer, moments):
    solver, told = solver_of(layer, {NAME: 24}, torch.float16, method="svd")
    with pytest.raises(PifaError, match=rf"{NAME}: its rank-24 solution does not fit torch\.float16"):
        solver(UP, layer.linears[UP].weight * 1e6, moments)
    assert told == []


@pytest.mark.parametrize("module", [Q, UP])  # with pivot rows and with columns
def test_inputs_that_say_nothing_still_leave_a_module_to_quantize(layer, module):
    name = f"model.layers.1.{module}"
    solver, _ = solver_of(layer, {name: 24}, method="svd", factors=FACTORS["int4"])
    nothing = Moments(64, torch.device("cpu"), folds=2)
    nothing.add(torch.zeros(4, 64), torch.zeros(4, 64))
    assert torch.isfinite(solver(module, layer.linears[module].weight, nothing)).all()


def test_columns_of_less_rank_than_the_rows_say_so(layer, moments):
    """A pivot row of zeros: rows count it, columns have no direction for it."""
    name, kind = f"model.layers.1.{UP}", FACTORS["int8"]
    weight = layer.linears[UP].weight.double()
    weight = torch.cat([torch.zeros(1, 64, dtype=torch.float64), weight[:7]])
    rows = PIFA(weight, torch.zeros(104, 8, dtype=torch.float64), torch.arange(8, dtype=torch.int32))

    class Given:
        def load(self, _):
            return rows

    options = CompressOptions(
        model=Path("model"), output=Path("out"), density=uniform(0.5), method="quantize", factors=kind
    )
    solver = LayerSolver(options, 1, layer, {name: 8}, None, torch.float32, {}, Given(), lambda _: None)
    solver(UP, layer.linears[UP].weight, moments)
    assert solver.reports[0].rank == 7 == len(solver.tensors[f"{name}.pivot_columns"])
