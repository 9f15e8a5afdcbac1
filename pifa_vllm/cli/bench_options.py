"""Options that several benchmarks share."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def plot_file(text: str) -> Path:
    """Read the file of --plot.

    Raises:
        ArgumentTypeError: if matplotlib is not installed.
    """
    # Now, not after an hour of measuring.
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib (pip install 'pifa-vllm[bench]')")
    return Path(text)


def densities_of(option: str, text: str) -> list[float]:
    """Read densities such as "0.8,0.6".

    Raises:
        PifaError: naming the option, if one is not in (0, 1].
    """
    from pifa_vllm.errors import PifaError

    try:
        densities = [float(x) for x in text.split(",")]
    except ValueError as error:
        raise PifaError(f"{option}: expected numbers and commas, found {text!r}.") from error
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise PifaError(f"{option}: expected numbers in (0, 1], found {density:g}.")
    return densities
