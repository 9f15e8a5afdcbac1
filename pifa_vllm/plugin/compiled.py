"""Compiled graphs that vLLM keeps on disk, where Inductor compiled them without vLLM's own backend: on CPUs."""

from __future__ import annotations

from typing import Any


def ensure_graphs_load() -> None:
    """Let vLLM load what it saved, rather than compile a model anew at each start.

    vLLM 0.32 calls `finalize_loading` on every graph that it loads, which only those of its own backend have; for
    any other it fails, and compiles again. Inductor's graphs are complete once they are loaded.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Graph

    if "finalize_loading" not in vars(Graph):
        # setattr: torch does not declare it.
        setattr(Graph, "finalize_loading", _finalize_loading)  # noqa: B010


def _finalize_loading(graph: Any, vllm_config: Any) -> None:
    """Do nothing."""
