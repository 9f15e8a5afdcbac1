"""Files that GitHub reads: against their schemas, which check-jsonschema brings. GitHub itself is not asked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
CONFIG = GITHUB / "ISSUE_TEMPLATE/config.yml"
FORMS = sorted(set(GITHUB.glob("ISSUE_TEMPLATE/*.yml")) - {CONFIG})


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [CONFIG]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_they_fit_their_schema(schema, files):
    assert files
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        f"vendor.{schema}",
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_commands_are_shell(workflow):
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
            else:
                script = re.sub(r"\$\{\{.*?\}\}", "value", step["run"])
                subprocess.run(["bash", "-n", "-c", script], check=True)


def test_the_workflow_runs_what_ci_runs():
    """Alone, and as a file that can be run."""
    (workflow,) = WORKFLOWS
    assert "- run: .ci/run\n" in workflow.read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_package_job_finds_its_tools_in_the_lock():
    (workflow,) = WORKFLOWS
    names = re.search(r"\^\(([\w|-]+)\)\$", workflow.read_text())[1].split("|")
    lock = (ROOT / "requirements-cpu.lock").read_text()
    assert all(re.search(rf"^{name}==", lock, re.MULTILINE) for name in names)
