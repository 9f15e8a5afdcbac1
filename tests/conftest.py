"""One tiny model in its three forms, built once."""

from __future__ import annotations

import os

# Before torch starts its threads: the models here are tiny, and threads that spin between their little kernels
# slow everything down as soon as two processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.pifa_tiny import save_pifa_twin
from tests.release import vllm_before
from tests.tiny import save_tiny_model

if TYPE_CHECKING:
    from tests.server.serving import Server

# Whose tests share the server below.
SHARING = ("deploy", "examples", "server")


class Twins(NamedTuple):
    """The dense original, a PIFA checkpoint with some modules dense, and the matrices it stands for."""

    original: Path
    pifa: Path
    dense: Path


def pytest_itemcollected(item: pytest.Item) -> None:
    """For `--dist loadgroup`: what shares a server stays together, as does a file.

    Not in pytest_collection_modifyitems: xdist reads the groups there, before any conftest is asked.
    """
    shares = item.path.parent.name in SHARING and "server" in getattr(item, "fixturenames", ())
    item.add_marker(pytest.mark.xdist_group("server" if shares else item.nodeid.partition("::")[0]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts engines begins first, so that no core is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """A tiny llama in two shards whose k_proj stay dense. Read it; copy it before changing it."""
    root = tmp_path_factory.mktemp("twins")
    found = Twins(root / "original", root / "pifa", root / "dense")
    save_tiny_model(found.original, max_shard_size="200KB")
    save_pifa_twin(
        found.original,
        found.pifa,
        found.dense,
        ranks=lambda name, m, n: None if name.endswith("k_proj") else min(m, n) // 2,
    )
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PIFA checkpoint whose k_proj stay dense, in float32."""
    root = tmp_path_factory.mktemp("served")
    # vLLM's CPU attention takes head sizes from 32 on.
    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(
        root / "dense",
        root / "pifa",
        root / "twin",
        ranks=lambda name, m, n: None if name.endswith("k_proj") else min(m, n) // 2,
    )
    return root / "pifa"


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`pifa-vllm serve` without a key, with a limit on requests that tests can reach."""
    from tests.server.serving import serve

    strict = () if vllm_before("0.32") else ("--tool-strict-level", "parameter")
    with serve(
        checkpoint,
        tmp_path_factory.mktemp("log") / "server.log",
        *("--max-model-len", "256", "--max-num-seqs", "16", "--server.probe-interval", "2"),
        # Routes that must stay shut although vLLM has them.
        *("--enable-offline-docs",),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", *strict),
        # A random model would fill its answer with spaces.
        *("--structured-outputs-config.backend", "xgrammar"),
        *("--structured-outputs-config.disable_any_whitespace", "true"),
        VLLM_MAX_N_SEQUENCES="16",
    ) as running:
        yield running
