from __future__ import annotations

from typing import Any

import pytest

from pifa_vllm.compression.report.findings import findings
from pifa_vllm.compression.report.schema import LayerReport
from tests.compression.report.sample_report import module, sample_report


def test_an_ordinary_run_gives_no_finding() -> None:
    assert findings(sample_report()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": []}, "No evaluation on unseen text"),
        ({"calibration": {"samples": 2, "length": 64}}, "128 calibration tokens are few for inputs of 96"),
        ({"density_target": 0.5}, "keeps more than was asked for"),
        ({"density_target": 0.7}, "falls short of its budget"),
        ({"layers": [LayerReport(layer=0, flow_error=0.7, seconds=1)]}, "70% away"),
        ({"modules": [module("q_proj", 0, 24, weight_error=1e-3)]}, "loses more than rounding explains"),
        ({"modules": [module("q_proj", 0, 24, max_coefficient=9.5)]}, "reach 9.5"),
        (
            {
                "modules": [
                    *(module("q_proj", i, 24) for i in range(5)),
                    module("q_proj", 5, 24, output_error=0.6),
                ]
            },
            "model.layers.5.self_attn.q_proj (0.600)",
        ),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(changes: dict[str, Any], message: str) -> None:
    found = findings(sample_report(**changes))
    assert len(found) == 1
    assert message in found[0]


def test_errors_that_were_planned_are_nothing_to_mend() -> None:
    modules = [*(module("q_proj", i, 24) for i in range(5)), module("q_proj", 5, 4, output_error=0.6)]
    planned = sample_report(modules=modules, options={"allocation": "sensitivity"})
    assert findings(planned) == []
    assert len(findings(sample_report(modules=modules, options={"allocation": "uniform"}))) == 1


def test_sixteen_bit_storage_is_judged_by_its_own_rounding() -> None:
    modules = [module("q_proj", 0, 24, weight_error=3e-3)]
    assert findings(sample_report(modules=modules, dtype="bfloat16")) == []
    assert len(findings(sample_report(modules=modules, dtype="float32"))) == 1


def test_without_data_there_is_nothing_to_say_about_it() -> None:
    assert findings(sample_report(method="svd", calibration={"samples": 1, "length": 8})) == []
