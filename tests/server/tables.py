"""Writes results/README.md of what hostile.py, faults.py and soak.py measured: `python -m tests.server.tables`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _table(head: str, rows: list[tuple[Any, ...]]) -> str:
    names = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _words(found: dict[str, Any]) -> str:
    inner = {name: _words(value) if isinstance(value, dict) else value for name, value in found.items()}
    return ", ".join(f"{name}: {value}" for name, value in inner.items()).replace("|", "\\|")


def render(hostile: dict[str, Any], faults: dict[str, Any], soak: dict[str, Any]) -> str:
    """The whole document."""
    attacks = [
        (
            name,
            found.get("status", ""),
            found.get("bare vLLM's status", ""),
            found["honest status"],
            found["honest seconds"],
        )
        for name, found in hostile["attacks"].items()
    ]
    fuzz = hostile["fuzzing"]
    failures = [
        (text.replace("|", "\\|"), seen["times"], seen["bare"]) for text, seen in fuzz["failures"].items()
    ]
    lost = [
        (name, found.get("lost", 0), _words({k: v for k, v in found.items() if k != "lost"}))
        for name, found in faults["faults"].items()
    ]
    honest, growth = hostile["honest seconds"], soak["growth after the warm-up"]
    return f"""# A server under attack, with faults, and under load

Made by `python -m tests.server.tables` of the JSON beside it. All are of a tiny model, on two cores of a shared
machine on which other things ran, so that seconds are upper bounds.

## Hostile clients

`{hostile["command"]} --output hostile.json`: each attack went through a real nginx (`deploy/proxy`), and an honest
request went into it. Honest requests took {honest["median"]:.2f} s in the median, {honest["largest"]} s at most.
Resident memory of all processes in MB: {_words(hostile["resident MB"])}. Tracebacks in the log:
{hostile["tracebacks in the log"]}. Where the answer is an error of the server, bare vLLM was asked, too;
0 is no answer: after a million answers to one request had been asked of it, bare vLLM gave none to anything.

{_table("attack | status | bare vLLM's | honest status | honest seconds", attacks)}

schemathesis made {fuzz["requests"]} requests of the server's own schema ({fuzz["operations"]} operations):
{_words(fuzz["statuses"])}. Answered with 500 or more, and sent to bare vLLM once more:

{_table("request and answer | times | bare vLLM's", failures)}

## Faults

`{faults["command"]} --output faults.json`. What is lost are requests that were let in and did not get their whole
answer; each got an error, none waited.

{_table("fault | lost | seen", lost)}

## Soak

`{soak["command"]} --output soak.json`: {soak["minutes"]:g} minutes of {soak["clients"]} clients that ask, stream,
leave, and are wrong: {_words(soak["outcomes"])}. Growth from the middle to the end, after a third for warming up:
{_words(growth)}. The fixed prompt's output is the same at the end: {soak["the fixed prompt's output is the same"]}.
Exit code {soak["exit code"]}; tracebacks in the log: {soak["tracebacks in the log"]}.
"""


def main() -> None:
    """Write it."""
    read = [json.loads((RESULTS / f"{name}.json").read_text()) for name in ("hostile", "faults", "soak")]
    (RESULTS / "README.md").write_text(render(*read))


if __name__ == "__main__":
    main()
