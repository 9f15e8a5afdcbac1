"""The Python API: few names, their arguments, and a page whose examples run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import pifa_vllm
from tests.compression.runs import write_text
from tests.tiny import save_tiny_model

PAGE = Path(pifa_vllm.__file__).with_name("README.md")
# Who changes these breaks programs: say so in CHANGELOG.md.
SIGNATURES = {
    "compress": "(model, output, *, density, method='mpifa-exact', calibration='self', samples=128, length=2048, "
    "seed=0, dtype=None, device='cpu', progress=None, **options)",
    "heal": "(model, output, *, teacher, tokens, calibration='self', lr=3e-05, seed=0, device='cpu', **options)",
    "factorize": "(u, v, *, max_coefficient=1.05)",
    "load": "(directory, *, dtype='auto', device='cpu')",
    "PIFA": "(pivot_weight, coefficients, pivot_rows)",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def test_the_names_are_these() -> None:
    assert sorted(pifa_vllm.__all__) == sorted(SIGNATURES)
    assert set(SIGNATURES) <= set(dir(pifa_vllm))
    with pytest.raises(AttributeError, match="module 'pifa_vllm' has no attribute 'decompress'"):
        _ = pifa_vllm.decompress


@pytest.mark.parametrize("name", SIGNATURES)
def test_their_arguments_are_these_typed_and_documented(name: str) -> None:
    found = inspect.signature(getattr(pifa_vllm, name))
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    assert str(found.replace(parameters=parameters, return_annotation=found.empty)) == SIGNATURES[name]
    assert all(p.annotation is not p.empty for p in found.parameters.values())
    doc = inspect.getdoc(getattr(pifa_vllm, name))
    assert all(re.search(rf"^ +{parameter}: ", doc, re.MULTILINE) for parameter in found.parameters)


def test_the_pages_examples_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("smollm2").symlink_to(model)
    write_text(Path("text.txt"), 20_000)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", page, re.MULTILINE)
    assert printed[-len(promised) :] == promised
    assert printed[0].startswith("kept 7")
