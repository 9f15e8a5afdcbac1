"""The committed dashboards and rules are what their generators write, and fit Grafana's grid."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grafana_foundation_sdk")

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))


def test_generating_the_dashboards_again_gives_the_committed_ones(tmp_path):
    subprocess.run([sys.executable, str(DEPLOY / "grafana/dashboards.py"), str(tmp_path)], check=True)
    assert {path.name for path in DASHBOARDS} == {"overview.json", "memory.json", "compression.json"}
    for path in DASHBOARDS:
        assert (tmp_path / path.name).read_text() == path.read_text(), "run deploy/grafana/dashboards.py"


def test_generating_the_operators_rules_again_gives_the_committed_ones(tmp_path):
    made = tmp_path / "rules.yaml"
    subprocess.run([sys.executable, str(DEPLOY / "kubernetes/rules.py"), str(made)], check=True)
    committed = DEPLOY / "kubernetes/base/prometheusrule.yaml"
    assert made.read_text() == committed.read_text(), "run deploy/kubernetes/rules.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_lie_side_by_side_and_ask_for_something(path):
    dashboard = json.loads(path.read_text())
    taken = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
        assert all(query["expr"] for query in panel["targets"])
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"]
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}
