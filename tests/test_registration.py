"""`import pifa_vllm` is light, registers in either order of imports, and never breaks transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

IS_REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('pifa' in m)"


def python(*lines: str) -> str:
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.parametrize("module", ["pifa_vllm", "pifa_vllm.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "vllm",
        "pydantic",
        "rich",
        "pifa_vllm.compression",
        "pifa_vllm.hf",
    }
    assert python(f"import sys, {module}", f"print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_registered_when_transformers_comes_later() -> None:
    found = python(
        "import sys, pifa_vllm, pifa_vllm.registration as registration",
        "registration.register()",
        "print('transformers' in sys.modules)",
        IS_REGISTERED,
        # Asking again changes nothing.
        "registration.register()",
        "print('pifa' in m)",
    )
    assert found.split() == ["False", "True", "True"]


def test_registered_when_transformers_was_there_before() -> None:
    assert python("import transformers.quantizers.auto", "import pifa_vllm", IS_REGISTERED) == "True"


def test_transformers_goes_on_without_us() -> None:
    found = python("import sys, pifa_vllm", "sys.modules['pifa_vllm.hf'] = None", IS_REGISTERED)
    assert found.startswith("False")
    assert "UserWarning: transformers will not load PIFA checkpoints" in found
