"""Markdown tables of committed results, so that no figure in a README is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A head, and a line per row."""
    lines = [columns, *rows]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|---" * len(columns) + "|", *body])
