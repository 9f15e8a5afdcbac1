"""Loads other weights into one engine and writes what it said; started by test_reload.py.

Usage: python -m tests.plugin.reloaded_engine JOB.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.plugin.greedy import greedy, start  # isort: skip  # sets vLLM's environment
from safetensors.torch import load_file


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = start(job["model"], **job["options"])
    found: dict[str, Any] = {}

    def ask(name: str) -> None:
        llm.reset_prefix_cache()
        found[name] = greedy(llm, job["prompts"], job["tokens"])

    def reload(name: str, **options: Any) -> None:
        try:
            llm.collective_rpc("reload_weights", kwargs=options)
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]

    ask("first")
    reload("again")
    ask("first again")
    for name, directory in job["refused"].items():
        reload(name, weights_path=directory)
    ask("after refusals")
    reload("without a path")  # not what was refused last
    ask("after that")
    llm.sleep(level=1)
    llm.wake_up()
    ask("after sleep")
    reload("second", weights_path=job["second"])
    ask("second")

    # Tensors from a trainer cannot be looked through before.
    tensors = load_file(Path(job["model"]) / "model.safetensors")
    reload("from tensors", weights_iterator=tensors.items())
    ask("first from tensors")
    tensors[job["damaged"]] = tensors[job["damaged"]] * float("nan")
    reload("damaged tensors", weights_iterator=tensors.items())
    reload("after damage", weights_path=job["second"])

    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    # Engines that share a process cannot all be shut down in order.
    os._exit(0)


if __name__ == "__main__":
    main()
