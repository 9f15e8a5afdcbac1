"""Engines on a Ray cluster of this one machine; started by test_parallel_engines.py like `tests.plugin.engines`.

Usage: python -m tests.plugin.ray_engines JOBS.json RESULTS.json

The jobs run in one Ray actor, as Ray Serve and Ray Data run vLLM. At most the last one may start an engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray


@ray.remote(num_cpus=1)
class Engine:
    def run(self, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        from tests.plugin import engines

        return {name: engines.run(job, []) for name, job in jobs.items()}


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    engine = Engine.remote()
    found = ray.get(engine.run.remote(json.loads(jobs.read_text())))
    ray.kill(engine)
    results.write_text(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main()
