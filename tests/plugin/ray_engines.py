"""Engines on a Ray cluster of this one machine; started by test_parallel_engines.py like `tests.plugin.engines`.

Usage: python -m tests.plugin.ray_engines JOBS.json RESULTS.json

Every job runs in a Ray actor of its own, as Ray Serve and Ray Data run vLLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray


@ray.remote(num_cpus=1)
class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def run(self) -> dict[str, Any]:
        from tests.plugin import engines

        return engines.run(self.job, [])


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    found = {}
    for name, job in json.loads(jobs.read_text()).items():
        engine = Engine.remote(job)
        found[name] = ray.get(engine.run.remote())
        ray.kill(engine)
    results.write_text(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main()
