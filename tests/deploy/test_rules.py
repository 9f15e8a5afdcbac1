"""Prometheus' own tool on its configuration, and on what each alert does in time."""

import shutil
import subprocess
from pathlib import Path

import pytest

PROMETHEUS = Path(__file__).parents[2] / "deploy/prometheus"

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs Prometheus' promtool (Debian's package prometheus)"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", str(PROMETHEUS / "prometheus.yml")),
        ("check", "rules", str(PROMETHEUS / "rules.yml")),
        ("test", "rules", str(Path(__file__).with_name("rules_test.yml"))),
    ],
    ids=["config", "rules", "alerts"],
)
def test_promtool(arguments):
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
