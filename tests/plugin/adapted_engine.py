"""Serves LoRA adapters on one model and writes what it said; started by test_lora.py.

Usage: python -m tests.plugin.adapted_engine JOB.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.plugin.greedy import greedy, start  # isort: skip  # sets vLLM's environment
from vllm.lora.request import LoRARequest


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = start(job["model"], enable_lora=True, **job["options"])
    ids = {name: i for i, name in enumerate(job["adapters"], start=1)}

    def request(name: str | None) -> LoRARequest | None:
        return LoRARequest(name, ids[name], job["adapters"][name]) if name else None

    def ask(names: list[str | None]) -> dict[str, Any]:
        """Every prompt with each of the adapters, all at once."""
        prompts = [prompt for prompt in job["prompts"] for _ in names]
        requests = [request(name) for _ in job["prompts"] for name in names]
        said = greedy(llm, prompts, job["tokens"], lora_request=requests)
        return {name or "none": said[i :: len(names)] for i, name in enumerate(names)}

    found: dict[str, Any] = {"batches": [ask(names) for names in job["batches"]], "refused": {}}
    for name in job["wrong"]:
        try:
            llm.llm_engine.add_lora(request(name))
        except Exception as error:
            found["refused"][name] = [type(error).__name__, str(error)]
    found["afterwards"] = ask(job["batches"][-1])
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    # Engines that share a process cannot all be shut down in order.
    os._exit(0)


if __name__ == "__main__":
    main()
