import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_tritons_interpreter():
    # A process of its own: Triton reads the variable when it is imported, which others here may have done already.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--noconftest",
            "interpreted_kernels.py",
        ],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
