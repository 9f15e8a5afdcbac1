"""Run a plan: make every checkpoint, and keep what each of its windows says."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pifa_vllm.bench.machine import describe_machine
from pifa_vllm.bench.quality.cost import cost
from pifa_vllm.bench.quality.plan import DENSE, Case, Plan, identity, options
from pifa_vllm.bench.quality.rivals import (
    Change,
    gptq,
    magnitude,
    make_rival,
    round_to_nearest,
    sparsegpt,
    wanda,
)
from pifa_vllm.checkpoint import read_json
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.compression.report.record import read_report
from pifa_vllm.errors import PifaError
from pifa_vllm.evaluate.comparison import Comparison, Reference

KIND = "quality"
_ENOUGH_WINDOWS = 64


def quality(
    plan: Plan,
    output: Path,
    work_dir: Path,
    *,
    only: list[str] | None,
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make every checkpoint of a plan and compare it with the dense model.

    Rows that are in `output` already are kept. Each compression is a process of its own, so that its CPU time and
    peak memory are its own.

    Args:
        plan: what is to be measured.
        output: JSON file of results, written after every row.
        work_dir: for the checkpoints and the dense model's figures, which are kept.
        only: these variants in this run; rows of others stay.
        command: the command line, for the record.
        say: told of each row.

    Raises:
        PifaError: if a compression fails, or `output` has results of another model, text or windows.

    Returns:
        The results.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    texts = {name: _read(path) for name, path in plan.texts.items()}
    subject = {
        "kind": KIND,
        "model": plan.model.name,
        "texts": {
            name: {"file": plan.texts[name].name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in texts.items()
        },
        "seqlen": plan.seqlen,
        "max_windows": plan.max_windows,
    }
    rows = _earlier_rows(output, subject)
    references: dict[str, Reference] = {}

    def results() -> dict[str, Any]:
        about = {"command": command, **subject, "against": plan.against, "machine": describe_machine()}
        return {**about, "rows": rows}

    def measure(who: dict[str, Any], names: list[str], directory: Path | None, about: dict[str, Any]) -> None:
        for name in names:
            if name not in references:
                references[name] = Reference(
                    plan.model,
                    texts[name],
                    seqlen=plan.seqlen,
                    max_windows=plan.max_windows,
                    cache=work_dir,
                    say=say,
                )
                count = len(references[name].windows.tokens)
                if count < _ENOUGH_WINDOWS:
                    say(f"{name}: {count} windows, too few to tell small differences; shorter ones help")
            found = references[name].compare(directory)
            gc.collect()
            # What was measured of the same under the same name before is of other options by now.
            same = ("variant", "density", "seed")
            rows[:] = [r for r in rows if r["text"] != name or any(r[key] != who[key] for key in same)]
            row = {**who, "text": name, **about, "windows": _windows(found)}
            rows.append(row)
            replace_text(output, json.dumps(results(), indent=1, allow_nan=False) + "\n")
            brief = {k: row[k] for k in (*same, "text")}
            say(json.dumps(brief | {"perplexity": round(found.perplexity, 4)}))

    def missing(who: dict[str, Any]) -> list[str]:
        return [x for x in texts if not any(r["text"] == x and who.items() <= r.items() for r in rows)]

    nobody: dict[str, Any] = {"variant": DENSE, "density": None, "seed": None, "how": {}}
    measure(nobody, missing(nobody), None, cost(plan.model, None))
    for case in plan.cases():
        if only is not None and case.name not in only:
            continue
        who = identity(case, plan)
        if unmeasured := missing(who):
            directory = _make(case, plan, who["how"], work_dir)
            measure(who, unmeasured, directory, _about(case, directory))
    return results()


def _windows(found: Comparison) -> dict[str, list[float]]:
    """Every window's figures; nine digits are more than float32 logits have."""
    return {name: [float(f"{x:.9g}") for x in getattr(found, name)] for name in ("nll", "kl", "top1")}


def _about(case: Case, directory: Path) -> dict[str, Any]:
    """What a row says of the checkpoint besides its windows."""
    figures = cost(directory, case.variant)
    if case.variant.compress is not None:
        report = read_report(directory)
        modules = [x for x in report.modules if not x.dense]
        figures |= {
            "cpu_seconds": report.cpu_seconds,
            "seconds": report.seconds,
            "peak_rss_bytes": report.peak_rss_bytes,
            "max_weight_error": max((x.weight_error for x in modules), default=0.0),
            "max_coefficient": max((x.max_coefficient for x in modules), default=0.0),
        }
    return figures


def _make(case: Case, plan: Plan, how: dict[str, Any], work_dir: Path) -> Path:
    """The checkpoint of a case; made if it is not there."""
    if case.variant.directory is not None:
        return Path(how["directory"])
    # Those of another model or of other options are not to be taken for it.
    key = hashlib.sha256(json.dumps([str(plan.model.resolve()), how]).encode()).hexdigest()[:8]
    parts = [case.name, *(f"{x:g}" for x in (case.density, case.seed) if x is not None), key]
    directory = work_dir / "-".join(parts)
    if directory.exists():
        return directory
    if case.variant.compress is None:
        change, calibrated = _change(case)
        make_rival(plan.model, directory, change, plan.calibration if calibrated else None)
        return directory
    command = [sys.executable, "-m", "pifa_vllm", "compress", str(plan.model), str(directory)]
    command += options({"density": case.density or 1.0, "seed": case.seed or 0})
    command += options({**plan.calibration, **case.variant.compress})
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise PifaError(f"{directory}: `{' '.join(command)}` ended with exit code {done.returncode}.")
    return directory


def _change(case: Case) -> tuple[Change, bool]:
    """What a rival does to each weight, and whether it looks at the inputs."""
    bits, group = case.variant.bits, case.variant.group
    changes: dict[str, tuple[Change, bool]] = {
        "round": (round_to_nearest(bits, group), False),
        "gptq": (gptq(bits, group), True),
        "magnitude": (magnitude, False),
        "wanda": (wanda, True),
        "sparsegpt": (sparsegpt, True),
    }
    return changes[case.variant.rival or ""]


def _earlier_rows(output: Path, subject: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier attempt at the same measurement."""
    if not output.is_file():
        return []
    earlier = read_json(output)
    different = [name for name in subject.keys() - {"texts"} if earlier.get(name) != subject[name]]
    texts = earlier.get("texts", {})
    different += [
        f"text {name}" for name, value in subject["texts"].items() if texts.get(name, value) != value
    ]
    if different:
        raise PifaError(
            f"{output}: has results of another measurement ({', '.join(sorted(different))} differ), expected "
            "none or those of this plan."
        )
    # A plan may name further texts, or only one of them.
    subject["texts"] = texts | subject["texts"]
    rows: list[dict[str, Any]] = earlier["rows"]
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PifaError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
