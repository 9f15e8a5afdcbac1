"""What the speculative benchmark's results say: a table of speed, and when drafting can pay at all."""

from __future__ import annotations

import statistics
from typing import Any

from pifa_vllm.bench.table import markdown_table

_COLUMNS = (
    "density",
    "K",
    "acceptance rate",
    "acceptance length",
    "c",
    "predicted",
    "measured speed-up (rounds)",
    "ms per token, alone",
    "with the draft",
    "same answers",
)
_COST_RATIOS = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
_DRAFT_TOKENS = (1, 2, 4, 8)


def acceptance_length(a: float, k: int) -> float:
    """Tokens per step of the target, if each of k drafted tokens is accepted with probability a."""
    return sum(a**i for i in range(k + 1))


def speed_up(length: float, k: int, c: float) -> float:
    """Compare speculative with plain decoding where memory's speed decides, so that k + 1 tokens cost as one does.

    Args:
        length: tokens per step of the target.
        k: steps of the draft per step of the target.
        c: time of a draft's step / time of a target's step.
    """
    return length / (k * c + 1.0)


def break_even(k: int, c: float) -> float | None:
    """Return the acceptance rate at which `speed_up` is 1, for c in (0, 1); None if there is none."""
    low, high = 0.0, 1.0
    if speed_up(acceptance_length(high, k), k, c) <= 1.0:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        if speed_up(acceptance_length(middle, k), k, c) < 1.0:
            low = middle
        else:
            high = middle
    return high


def speculative_table(results: dict[str, Any]) -> str:
    """Acceptance and speed of every draft at every K, as Markdown; medians over the rounds.

    c is the time of a step of the draft, served alone, by that of the dense model. "Predicted" is `speed_up` with
    the acceptance length and the c that were measured; what the measured one falls short of it by is what
    verifying K + 1 tokens costs beyond one, and what drafting costs beside the draft's own steps.
    """
    lines = []
    prompts = results["subject"]["prompts"]
    for row in sorted(results["rows"], key=lambda row: row["density"]):
        alone = statistics.median(row["dense"])
        c = statistics.median(row["draft"]) / alone
        for k, found in sorted(row["speculative"].items(), key=lambda item: int(item[0])):
            length = 1.0 + found["accepted"] / found["drafts"]
            rounds = [a / b for a, b in zip(row["dense"], found["ms_per_token"], strict=True)]
            with_draft = statistics.median(found["ms_per_token"])
            cells = [
                f"{row['density']:.2f}",
                k,
                f"{found['accepted_by_position'][0] / found['drafts']:.2f}",
                f"{length:.2f}",
                f"{c:.2f}",
                f"{speed_up(length, int(k), c):.2f}x",
                f"{alone / with_draft:.2f}x ({min(rounds):.2f} to {max(rounds):.2f})",
                f"{alone:.1f}",
                f"{with_draft:.1f}",
                f"{found['identical']} of {prompts}",
            ]
            lines.append(cells)
    return markdown_table(_COLUMNS, lines)


def break_even_table() -> str:
    """The acceptance rate that a draft must reach to pay, by its cost c and by K, as Markdown."""
    rates = {c: [break_even(k, c) for k in _DRAFT_TOKENS] for c in _COST_RATIOS}
    return markdown_table(
        ("c", *(f"K = {k}" for k in _DRAFT_TOKENS)),
        [[f"{c:g}", *("never" if a is None else f"{a:.2f}" for a in row)] for c, row in rates.items()],
    )
