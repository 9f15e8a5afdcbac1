"""Plots of results, as SVG files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.errors import PifaError


def new_figure(*sizes: int, **options: Any) -> tuple[Any, Any]:
    """Return matplotlib's figure and axes; the arguments are those of `pyplot.subplots`.

    Raises:
        PifaError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PifaError("--plot needs matplotlib: pip install 'pifa-vllm[bench]'.") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot.subplots(*sizes, **options)


def save_figure(figure: Any, output: Path) -> None:
    """Write the figure to `output` and let go of it."""
    from matplotlib import pyplot

    figure.tight_layout()
    replace_file(output, lambda path: figure.savefig(path, format="svg"))
    pyplot.close(figure)
