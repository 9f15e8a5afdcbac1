"""Compiles models in turn and writes what was compiled and what they said; started by test_compilation.py.

Usage: python -m tests.plugin.compiled_engines JOB.json RESULT.json

A job's "place" is a path that every model is copied to in its turn, over the one before: vLLM's cache knows paths.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.plugin.greedy import greedy, start  # isort: skip  # sets vLLM's environment
import torch
from vllm.compilation.counter import compilation_counter
from vllm.config import CompilationMode
from vllm.platforms import current_platform


def compile_in_pieces() -> None:
    """Split the model at its attention layers on CPUs, too, as vLLM does for CUDA graphs."""
    update = current_platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        update(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.compile_sizes = []

    type(current_platform).check_and_update_config = staticmethod(check_and_update_config)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("in_pieces"):
        compile_in_pieces()
    found = []
    for model in job["models"]:
        if place := job.get("place"):
            shutil.rmtree(place, ignore_errors=True)
            model = shutil.copytree(model, place)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        before = compilation_counter.clone()
        llm = start(model, enforce_eager=False)
        said = greedy(llm, job["prompts"], job["tokens"])
        counted = {
            name: count - getattr(before, name)
            for name, count in dataclasses.asdict(compilation_counter).items()
        }
        dynamo = torch._dynamo.utils.counters
        counted["graph_breaks"] = sum(dynamo["graph_break"].values())
        counted["unique_graphs"] = dynamo["stats"]["unique_graphs"]
        counted["found_by_inductor"] = dynamo["inductor"]["fxgraph_cache_hit"]
        counted["compiled_by_inductor"] = dynamo["inductor"]["fxgraph_cache_miss"]
        found.append({"counted": counted, "said": said})
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    # Engines that share a process cannot all be shut down in order.
    os._exit(0)


if __name__ == "__main__":
    main()
