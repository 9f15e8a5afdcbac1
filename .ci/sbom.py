"""List what runs: `sbom.py PYTHON LEFT_OUT --sbom FILE --licences FILE`, in an environment with cyclonedx-bom.

The bill of materials is CycloneDX, as `cyclonedx-py` reads it from the environment of PYTHON, without the packages
that LEFT_OUT names. The second file is a table of the same packages by licence.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CYCLONEDX = [
    sys.executable,
    "-m",
    "cyclonedx_py",
    "environment",
    "--output-reproducible",
    "--output-format=JSON",
]
# pip installs, and does not run.
NOT_RUN = {"pip"}
HEADER = """\
# Licences of what the CPU environment runs

As the packages declare them; made by `make sbom`. vLLM's image for GPUs brings its own packages, not listed.

| package | version | licence |
|---|---|---|
"""


def canonical(name: str) -> str:
    """A package's name as the lock spells it."""
    return re.sub(r"[-_.]+", "-", name.lower())


def licence(component: dict[str, Any]) -> str:
    """What a package declares: an expression or identifier if there is one, else its classifiers."""
    stated = component.get("licenses", [])
    exact = [entry.get("expression") or entry.get("license", {}).get("id") for entry in stated]
    words = [entry.get("license", {}).get("name", "") for entry in stated]
    # Some put the licence's whole text where its name belongs.
    short = [word.rpartition(" :: ")[2] for word in words if 0 < len(word) < 80 and "\n" not in word]
    return ", ".join(dict.fromkeys([name for name in exact if name] or short)) or "not declared"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python")
    parser.add_argument("left_out", type=Path)
    parser.add_argument("--sbom", type=Path, required=True)
    parser.add_argument("--licences", type=Path, required=True)
    arguments = parser.parse_args()
    found = subprocess.run([*CYCLONEDX, arguments.python], stdout=subprocess.PIPE, text=True, check=True)
    bill = json.loads(found.stdout)
    left_out = NOT_RUN | {canonical(name) for name in arguments.left_out.read_text(encoding="utf-8").split()}
    kept = [part for part in bill["components"] if canonical(part["name"]) not in left_out]
    references = {part["bom-ref"] for part in kept}
    bill["components"] = kept
    bill["dependencies"] = [
        {
            **entry,
            "dependsOn": [reference for reference in entry.get("dependsOn", []) if reference in references],
        }
        for entry in bill["dependencies"]
        if entry["ref"] in references
    ]
    arguments.sbom.write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    rows = sorted((canonical(part["name"]), part["version"], licence(part)) for part in kept)
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    arguments.licences.write_text(HEADER + table, encoding="utf-8")


if __name__ == "__main__":
    main()
