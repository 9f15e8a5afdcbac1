"""Running one of the scripts beside the tests in a process of its own, and reading its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_script(module: str, job: dict[str, Any], directory: Path, **environment: str) -> Any:
    """Run `python -m module JOB.json RESULT.json`, and return the result."""
    path, results = directory / "job.json", directory / "result.json"
    path.write_text(json.dumps(job))
    process = subprocess.run(
        [sys.executable, "-m", module, str(path), str(results)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(results.read_text())
