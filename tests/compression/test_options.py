"""Options refuse what makes no sense, and record everything that the result depends on."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from pifa_vllm.compression.allocation import uniform
from pifa_vllm.compression.options import DEFAULT_RIDGE, FACTORS, CompressOptions
from pifa_vllm.errors import PifaError

# What may change between two attempts at the same result.
FREE = {"model", "output", "device"}


def options(**changes):
    if changes.get("method") == "quantize":
        changes.setdefault("factors", FACTORS["int8"])
    return CompressOptions(model=Path("model"), output=Path("out"), density=uniform(0.5), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "--samples: expected 1 or more, found 0"),
        ({"length": 7}, "--length: expected 8 or more, found 7"),
        ({"tile": 0}, "--tile: expected 1 or more, found 0"),
        ({"chunk_tokens": -1}, "--chunk-tokens: expected 1 or more, found -1"),
        ({"mix": -0.1}, r"--mix: expected a number in \[0, 1\], found -0.1"),
        ({"mix": math.nan}, "--mix: expected .*, found nan"),
        ({"feedback": 1.5}, r"--feedback: expected a number in \[0, 1\], found 1.5"),
        ({"ridge": -1e-3}, "--ridge: expected a number of 0 or more, found -0.001"),
        ({"ridge": math.inf}, "--ridge: .*found inf"),
        ({"ridge": math.nan}, "--ridge: .*found nan"),
        ({"method": "mpifa", "metric": "outputs"}, "--metric outputs: --method mpifa has no metric"),
        ({"gradient_samples": 0}, r"--gradient-samples: expected 1 to 128 \(--samples\), found 0"),
        ({"samples": 4, "gradient_samples": 5}, r"--gradient-samples: expected 1 to 4 .*found 5"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_flag(changes, message):
    with pytest.raises(PifaError, match=message):
        options(**changes)


def test_a_recipe_with_rules_leaves_nothing_to_allocate():
    rules = uniform(0.5, attention=0.6)
    even = CompressOptions(model=Path("model"), output=Path("out"), density=rules)
    assert (even.effective_allocation, even.effective_metric) == ("uniform", "outputs")
    with pytest.raises(PifaError, match=r"--allocation sensitivity: chooses .* found 1 rules beside it"):
        dataclasses.replace(even, allocation="sensitivity")
    assert options().effective_allocation == "sensitivity"
    assert not options(method="mpifa").uses_gradients


def test_everything_the_result_depends_on_is_recorded():
    names = {field.name for field in dataclasses.fields(CompressOptions)}
    assert options().record().keys() == names - FREE
    assert json.loads(json.dumps(options().record(), allow_nan=False)) == options().record()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "svd-llm"},
        {"representation": "lowrank"},
        {"calibration": "text.txt"},
        {"samples": 2},
        {"seed": 1},
        {"mix": 0.5},
        {"ridge": 0.5},
        {"tile": 8},
        {"dtype": "bfloat16"},
        {"factors": FACTORS["int8"]},
        {"activation_dtype": "bfloat16"},
    ],
)
def test_another_value_is_another_run(changes):
    assert options(**changes).record() != options().record()


@pytest.mark.parametrize("method", DEFAULT_RIDGE)
def test_the_ridge_is_the_methods_unless_given(method):
    assert options(method=method).effective_ridge == DEFAULT_RIDGE[method]
    assert options(method=method, ridge=0.0).effective_ridge == 0.0
    # The default spelled out is the same run.
    assert options(method=method).record() == options(method=method, ridge=DEFAULT_RIDGE[method]).record()


def test_who_looks_at_the_compressed_flow_and_at_its_drift():
    looking = [m for m in DEFAULT_RIDGE if options(method=m).uses_compressed_inputs]
    assert looking == ["mpifa", "mpifa-exact", "quantize"]
    assert [m for m in DEFAULT_RIDGE if options(method=m).uses_drift] == ["mpifa-exact", "quantize"]
    assert not options(method="mpifa-exact", feedback=0.0).uses_drift
