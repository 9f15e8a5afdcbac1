"""What is measured after a run, added to what the run wrote about itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.compression.report.render import render_files, render_model_card
from pifa_vllm.compression.report.schema import CARD_NAME, REPORT_NAME, CompressionReport, Evaluation
from pifa_vllm.errors import CheckpointError


def read_report(directory: Path) -> CompressionReport:
    """Read the compression report of a checkpoint directory.

    Raises:
        CheckpointError: if the directory has none, or it is not valid.
    """
    path = directory / REPORT_NAME
    try:
        return CompressionReport.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; expected the report that `pifa-vllm compress` writes beside the weights."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise CheckpointError(
            f"{path}: {where}: {first['msg']}, found {str(first['input'])[:60]!r}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error


def record(directory: Path, evaluations: Sequence[Evaluation]) -> list[str]:
    """Add figures to a directory's report and render its HTML page and model card anew.

    A figure takes the place of an older one that was measured in the same way. Each file is replaced whole or not
    at all. A model card that is missing, or is not what the report renders to, is its owner's and left alone.

    Args:
        directory: a checkpoint directory with a compression report.
        evaluations: what was measured on it.

    Raises:
        CheckpointError: if there is no valid report, or a file cannot be written.

    Returns:
        Names of the files that were written.
    """
    before = read_report(directory)
    measured = {_way(x) for x in evaluations}
    kept = [x for x in before.evaluation if _way(x) not in measured]
    after = before.model_copy(update={"evaluation": [*kept, *evaluations]})

    path = directory / CARD_NAME
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    # The card's own front matter has what it took over from its source's. The card of `after` is there if this was
    # killed before it came to the report.
    ours = [render_model_card(report, card) for report in (before, after)]
    files = render_files(after, card)
    if card not in ours:
        del files[CARD_NAME]
    for name, text in files.items():
        replace_text(directory / name, text)
    return list(files)


def _way(evaluation: Evaluation) -> str:
    """Everything but the result: what makes two figures answers to the same question."""
    return evaluation.model_dump_json(exclude={"value", "nll", "text_sha256"})
