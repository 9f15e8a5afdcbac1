"""Run the tests that need vLLM in several environments: `matrix.py ENV... --output FILE [-- PYTEST ARGUMENTS]`.

Prints a Markdown table, and exits with 1 if a test failed or an environment does not fit together.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from lock import LEFT_OUT

TESTS = [
    "tests/plugin",
    "tests/server",
    "tests/cli/test_serve.py",
    "tests/evaluate/test_served.py",
    "tests/test_hf.py",
]
# Of one distribution or another: PyPI's CPU builds are not called vllm.
VERSIONS = """
import importlib.metadata, json, platform, torch, transformers, vllm
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                  "python": platform.python_version()}))
"""


def complaints(python: str) -> list[str]:
    """What `pip check` says, but for the packages that are kept out on purpose."""
    said = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in said.splitlines() if "No broken requirements" not in line]
    return [line for line in lines if not any(f"requires {name}," in line for name in LEFT_OUT)]


def run(environment: Path, arguments: list[str]) -> dict[str, Any]:
    """Run the tests in one environment, and count."""
    python = str(environment / "bin" / "python")
    found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [python, "-m", "pytest", "--junitxml", report.name, *TESTS, *arguments]
        code = subprocess.run(command, check=False).returncode
        suite = ElementTree.parse(report.name).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        **json.loads(found.splitlines()[-1]),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "exit_code": code,
        "pip_check": complaints(python),
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line per environment, in Markdown."""
    columns = ["vllm", "torch", "transformers", "python", "passed", "failed", "skipped"]
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Run all."""
    ours, arguments = sys.argv[1:], []
    if "--" in ours:
        at = ours.index("--")
        ours, arguments = ours[:at], ours[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environments", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(ours)
    results = [run(environment, arguments) for environment in args.environments]
    results.sort(key=lambda row: [int(part) for part in row["vllm"].split(".")[:2]])
    args.output.write_text(json.dumps({"command": "make test-matrix", "versions": results}, indent=2) + "\n")
    print(table(results))
    for row in results:
        for line in row["pip_check"]:
            print(f"vllm {row['vllm']}: pip check: {line}")
    return int(any(row["exit_code"] or row["pip_check"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
