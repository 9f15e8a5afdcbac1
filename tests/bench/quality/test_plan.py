"""Plans: which checkpoints they ask for, and what is wrong with those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.quality.plan import Plan, identity, options, read_plan
from pifa_vllm.errors import PifaError

GOOD = """
model: dense
texts: {a: a.txt}
densities: [0.8, 0.5]
calibration: {samples: 4}
variants:
  ours: {compress: {method: mpifa}, seeds: {0.5: [0, 1]}}
  svd: {compress: {method: svd}, densities: [0.5]}
  healed: {directory: "healed-{density}"}
  int4: {rival: round, bits: 4}
"""


def plan_of(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return read_plan(path)


def test_all_variants_come_before_a_second_seed(tmp_path: Path) -> None:
    cases = [(x.name, x.density, x.seed) for x in plan_of(tmp_path, GOOD).cases()]
    assert cases == [
        ("ours", 0.8, 0),
        ("ours", 0.5, 0),
        ("svd", 0.5, 0),
        ("healed", 0.8, None),
        ("healed", 0.5, None),
        ("int4", None, None),
        ("ours", 0.5, 1),
    ]


def test_a_row_is_of_its_options(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GOOD)
    ours, _, _, healed, *_ = plan.cases()
    assert identity(ours, plan)["how"] == {"compress": {"method": "mpifa"}, "calibration": {"samples": 4}}
    assert identity(healed, plan)["how"] == {"directory": "healed-0.8", "written": 0}
    other = plan_of(tmp_path, GOOD.replace("samples: 4", "samples: 5"))
    assert identity(next(other.cases()), other) != identity(ours, plan)


def test_options_as_a_command_line_has_them() -> None:
    assert options({"chunk_tokens": 4, "dry-run": True, "x": False}) == ["--chunk-tokens", "4", "--dry-run"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("densities: [0.8, 0.5]", "densities: [0.8, 1.5]", r"expected numbers in \(0, 1\], found 1.5"),
        ("rival: round", "rival: magic", "variants.int4.rival: Input should be 'round', .* found 'magic'"),
        ("{rival: round, bits: 4}", "{bits: 4}", "expected one of compress, directory and rival, found none"),
        ("rival: round, bits: 4", "rival: gptq, bits: 6", "gptq: expected 4 or 8 bits in .* found 6 in"),
        ("rival: round", "rival: round, directory: x", "found directory and rival"),
        ("  int4:", "  dense:", "'dense' is the dense model's own row"),
        ("model: dense", "against: theirs\nmodel: dense", "expected one of the variants, found 'theirs'"),
        ("model: dense", "", "model: Field required"),
        ("model: dense", "model: dense\nwindows: 3", "windows: Extra inputs are not permitted, found '3'"),
        ("model: dense", "model: [", "cannot be read as YAML"),
    ],
)
def test_refusals(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(PifaError, match=rf"plan\.yaml: .*{message}"):
        plan_of(tmp_path, GOOD.replace(old, new))


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PifaError, match=r"nowhere\.yaml: cannot be read as YAML"):
        read_plan(tmp_path / "nowhere.yaml")
    with pytest.raises(PifaError, match=r"plan\.yaml: "):
        plan_of(tmp_path, "- 1")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("quality-*.yaml")), ids=lambda path: path.stem)
def test_the_committed_plans_are_plans(path):
    assert "mpifa-exact" in read_plan(path).variants
