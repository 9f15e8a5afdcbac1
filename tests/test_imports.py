"""What waits for a module of another package is done after its import, once, and never breaks it."""

import subprocess
import sys

import pytest

pytest.importorskip("vllm")

EXECUTOR = "vllm.v1.executor.multiproc_executor"
REGISTER = "import sys; from pifa_vllm.plugin import register; register()"
IS_MENDED = (
    f"from {EXECUTOR} import MultiprocExecutor; call = MultiprocExecutor.collective_rpc; "
    "print('mended', hasattr(call, '__wrapped__'), hasattr(getattr(call, '__wrapped__', 0), '__wrapped__'))"
)


def python(*lines):
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stdout + done.stderr


def test_the_executor_is_mended_when_it_is_there_and_not_imported_before():
    found, _ = python(REGISTER, f"print('early', {EXECUTOR!r} in sys.modules)", "register()", IS_MENDED)
    assert found.split("\n")[-3:-1] == ["early False", "mended True False"]


def test_the_executor_that_was_there_before_is_mended_once():
    found, _ = python(f"import {EXECUTOR}", REGISTER, "register()", IS_MENDED)
    assert found.split("\n")[-2] == "mended True False"


def test_a_mend_that_fails_leaves_the_executor_as_it_is():
    found, said = python(REGISTER, "sys.modules['pifa_vllm.plugin.replies'] = None", IS_MENDED)
    assert found.split("\n")[-2] == "mended False False"
    assert "vLLM's executor is not as expected" in said


def test_what_is_not_there_is_missing_as_usual():
    found, _ = python(
        "from wrapt import register_post_import_hook",
        "import pifa_vllm",
        "register_post_import_hook(lambda module: print('called'), 'no_such_module')",
        "try: import no_such_module",
        "except ModuleNotFoundError: print('as usual')",
    )
    assert found == "as usual\n"
