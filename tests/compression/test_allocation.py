import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_vllm.compression.allocation import Recipe, allocate, kept_parameters, load_recipe, uniform
from pifa_vllm.compression.decoder import LinearShape
from pifa_vllm.errors import PifaError
from pifa_vllm.factorization import pifa_rank


def layer_shapes(layers, hidden, kv, intermediate):
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return [
        LinearShape(f"model.layers.{layer}.{module}", layer, module, m, n)
        for layer in range(layers)
        for module, (m, n) in shapes.items()
    ]


SMOLLM2 = layer_shapes(30, 576, 192, 1536)
LLAMA2_7B = layer_shapes(32, 4096, 4096, 11008)


@pytest.mark.parametrize("representation", ["pifa", "lowrank"])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("linears", [SMOLLM2, LLAMA2_7B], ids=["smollm2", "llama2-7b"])
def test_kept_parameters_meet_the_budget(linears, density, representation):
    ranks = allocate(linears, uniform(density), representation, tile=16)
    dense = sum(x.m * x.n for x in linears)
    kept = kept_parameters(linears, ranks, representation) / dense
    assert density - 0.002 <= kept <= density
    assert all(rank % 16 == 0 for rank in ranks.values())


@settings(max_examples=50, deadline=None)
@given(
    density=st.floats(0.05, 1.0),
    tile=st.sampled_from([1, 4, 16, 64]),
    hidden=st.integers(1, 80),
    kv=st.integers(1, 80),
    intermediate=st.integers(1, 200),
)
def test_the_budget_is_never_exceeded(density, tile, hidden, kv, intermediate):
    linears = layer_shapes(2, hidden, kv, intermediate)
    if any(pifa_rank(x.m, x.n, density) == 0 for x in linears):
        with pytest.raises(PifaError, match="keeps nothing"):
            allocate(linears, uniform(density), "pifa", tile)
        return
    ranks = allocate(linears, uniform(density), "pifa", tile)
    for linear in linears:
        if linear.name in ranks:
            assert 0 < ranks[linear.name] < min(linear.m, linear.n)
    dense = sum(x.m * x.n for x in linears)
    # Modules that no rank below full saves anything on stay dense, whatever the budget.
    assert kept_parameters(linears, ranks, "pifa") <= density * dense * (1 + 1e-12) or len(ranks) < len(
        linears
    )


def test_density_one_keeps_everything_dense():
    assert allocate(SMOLLM2, uniform(1.0), "pifa", 16) == {}


def test_attention_and_mlp_get_their_own_densities():
    ranks = allocate(SMOLLM2, uniform(0.8, attention=1.0, mlp=0.5), "pifa", 16)
    assert all(".mlp." in name for name in ranks)
    assert len(ranks) == 90


def test_recipe_rules_apply_in_order(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "density: 0.5\n"
        "rules:\n"
        '  - {match: "*.down_proj", density: 1.0}\n'
        '  - {layers: [0, "28-29"], density: 0.9}\n'
        '  - {match: "*.self_attn.*", layers: [1], density: 0.7}\n'
    )
    recipe = load_recipe(path)
    by_name = {x.name: recipe(x) for x in SMOLLM2}
    assert by_name["model.layers.0.mlp.down_proj"] == 1.0
    assert by_name["model.layers.0.mlp.up_proj"] == 0.9
    assert by_name["model.layers.29.self_attn.q_proj"] == 0.9
    assert by_name["model.layers.1.self_attn.q_proj"] == 0.7
    assert by_name["model.layers.1.mlp.up_proj"] == 0.5
    ranks = allocate(SMOLLM2, recipe, "pifa", 16)
    assert "model.layers.3.mlp.down_proj" not in ranks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("density: 1.5", "density.*less than or equal to 1.*1.5"),
        ("density: 0.5\nrules: [{density: 0}]", r"rules\.0\.density"),
        ("density: 0.5\nrules: [{layers: [x-y], density: 0.5}]", "layers.*x-y"),
        ("density: 0.5\nspeed: 3", "speed"),
        ("density: [", "cannot be read as a YAML"),
        ("", "recipe"),
    ],
)
def test_bad_recipes_name_the_field(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(PifaError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(PifaError, match=r"missing\.yaml"):
        load_recipe(tmp_path / "missing.yaml")


def test_a_rule_about_nothing_is_refused_by_its_number():
    for rule, message in (
        ({"match": "*.downproj"}, r"rules\.1: expected modules that match '\*\.downproj' in all layers"),
        ({"layers": [30, "40-50"]}, r"rules\.1: .* in layers \[30, '40-50'\], found none"),
    ):
        rules = [{"match": "*.mlp.*", "density": 0.7}, {**rule, "density": 0.5}]
        with pytest.raises(PifaError, match=message):
            Recipe.model_validate({"density": 0.6, "rules": rules}).check(SMOLLM2)
    uniform(0.5, attention=0.6, mlp=0.7).check(SMOLLM2)


def test_no_low_rank_module_takes_more_than_dense():
    linears = layer_shapes(12, 576, 192, 1536)
    ranks = allocate(linears, uniform(0.99), "lowrank", tile=16)
    assert all(ranks[x.name] * (x.m + x.n) <= x.m * x.n for x in linears)


@pytest.mark.parametrize("density", [0.0, -0.5, 1.01, float("nan")])
def test_densities_out_of_range_are_refused(density):
    with pytest.raises(PifaError, match="density"):
        uniform(density)
