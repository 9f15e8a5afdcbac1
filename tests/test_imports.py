"""What waits for a module is done once, after it was imported."""

import subprocess
import sys

import pytest

from pifa_vllm.imports import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "awaited.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "awaited"
    sys.modules.pop("awaited", None)


def test_it_is_done_when_the_module_is_there(module):
    seen = []

    def action():
        seen.append(sys.modules[module].value)

    finders = len(sys.meta_path)
    when_imported(module, action)
    when_imported(module, action)
    assert seen == []
    assert len(sys.meta_path) == finders + 1
    import awaited

    assert awaited.value == 1
    assert seen == [1]
    assert len(sys.meta_path) == finders
    when_imported(module, action)
    assert seen == [1, 1]


def test_what_is_no_file_is_left_to_the_others(monkeypatch):
    code = (
        "import sys; from pifa_vllm.imports import when_imported;"
        "when_imported('no_such_module', lambda: None); when_imported('_queue', lambda: None)\n"
        "import _queue\n"
        "try: import no_such_module\n"
        "except ModuleNotFoundError: print('as usual')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "as usual\n"
