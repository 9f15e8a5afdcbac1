"""Generates base/prometheusrule.yaml, for the Prometheus operator, from the rules that compose.yaml uses.

`python deploy/kubernetes/rules.py [FILE]`
"""

import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
HEADER = "# Made of ../../prometheus/rules.yml by ../rules.py.\n"


class Dumper(yaml.SafeDumper):
    """Writes text of several lines as it is."""


def write_text(dumper: yaml.Dumper, text: str) -> yaml.ScalarNode:
    """Represent a string."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, write_text)


def main() -> None:
    """Write the manifest."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "base/prometheusrule.yaml"
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pifa-vllm"},
        "spec": yaml.safe_load((HERE.parent / "prometheus/rules.yml").read_text(encoding="utf-8")),
    }
    text = yaml.dump(manifest, Dumper=Dumper, sort_keys=False, width=110)
    output.write_text(HEADER + text, encoding="utf-8")


if __name__ == "__main__":
    main()
