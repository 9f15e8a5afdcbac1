"""Engines of two ranks of which one fails; started by test_replies.py.

Usage: python -m tests.plugin.failing JOB.json RESULT.json

The job is {"model", "start": rank that fails while the engine starts, or null, "call": rank that fails in a call
afterwards}. A rank that does not fail waits for the other in a collective, as ranks do in the middle of a layer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine in this process, and only its ranks in others.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import psutil
from torch import distributed
from vllm import LLM
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.plugin.engines import OPTIONS


class FailingWorker(CPUWorker):
    """Fails where it would warm up."""

    def compile_or_warm_up_model(self) -> Any:
        """See the top."""
        return fail(self, int(os.environ["FAILING_RANK"]))


def fail(worker: Any, failing: int) -> None:
    """Fail on one rank, and let the others wait for it."""
    if worker.rank == failing:
        raise ValueError(f"rank {failing} fails")
    distributed.barrier()


def refuse(worker: Any) -> None:
    """Fail on every rank, later on later ones."""
    time.sleep(0.5 * worker.rank)
    raise ValueError("all refuse")


def rank(worker: Any) -> int:
    """Answer with the rank."""
    return worker.rank


def outcome(action: Any) -> dict[str, Any]:
    """What it returned or raised, and how long that took."""
    started = time.monotonic()
    try:
        result = {"returned": action()}
    except Exception as error:
        result = {"raised": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - started}


def main() -> None:
    """Do the job."""
    path, results = map(Path, sys.argv[1:])
    job = json.loads(path.read_text())
    options = {**OPTIONS, "tensor_parallel_size": 2}
    if job["start"] is not None:
        os.environ["FAILING_RANK"] = str(job["start"])
        options["worker_cls"] = "tests.plugin.failing.FailingWorker"
        found = {"start": outcome(lambda: LLM(job["model"], **options) and None)}
    else:
        llm = LLM(job["model"], **options)
        found = {
            "refused": outcome(lambda: llm.collective_rpc(refuse)),
            "next": outcome(lambda: llm.collective_rpc(rank)),
            "stuck": outcome(lambda: llm.collective_rpc(fail, args=(job["call"],))),
            "after": outcome(lambda: llm.collective_rpc(rank, timeout=3)),
        }
    results.write_text(json.dumps(found))
    if job["start"] is None:
        # The rank that waits would do so for half an hour. An engine that did not start ends by itself.
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)


if __name__ == "__main__":
    main()
