"""`pifa_vllm.compress` is the command, called from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from pifa_vllm.cli import main
from pifa_vllm.compression.compress import compress
from pifa_vllm.compression.report.schema import CompressionReport
from pifa_vllm.errors import PifaError
from tests.compression.runs import Recorder, write_text
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def test_it_is_the_command(model: Path, tmp_path: Path) -> None:
    """The same fingerprint: the record of everything that the result depends on."""
    text = write_text(tmp_path / "text.txt")
    options = {"density": 0.7, "calibration": text, "samples": 4, "length": 32, "tile": 4}
    report = compress(model, tmp_path / "called", progress=Recorder(), **options)
    command = ["compress", str(model), str(tmp_path / "typed")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    typed = CompressionReport.model_validate_json((tmp_path / "typed/compression_report.json").read_text())
    assert typed.fingerprint == report.fingerprint
    for file in ("layer-00001.safetensors", "config.json"):
        assert (tmp_path / "typed" / file).read_bytes() == (tmp_path / "called" / file).read_bytes()
    assert report.command == (
        f"pifa_vllm.compress({str(model)!r}, {str(tmp_path / 'called')!r}, density=0.7, method='mpifa-exact', "
        f"calibration={str(text)!r}, samples=4, length=32, seed=0, dtype=None, device='cpu', tile=4)"
    )


def test_a_recipe_is_a_density(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("density: 0.6\nrules: [{match: '*.down_proj', density: 1.0}]\n")
    options = {"calibration": write_text(tmp_path / "text.txt"), "samples": 4, "length": 32, "tile": 4}
    report = compress(model, tmp_path / "out", density=recipe, progress=Recorder(), **options)
    assert {m.kind for m in report.modules if m.dense} == {"down_proj"}


def test_errors_are_the_commands(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PifaError, match=r"density: expected a number in \(0, 1\], found 1\.5"):
        compress(model, tmp_path / "out", density=1.5)
    with pytest.raises(PifaError, match=r"missing\.yaml: cannot be read"):
        compress(model, tmp_path / "out", density=tmp_path / "missing.yaml")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rigde'"):
        compress(model, tmp_path / "out", density=0.5, rigde=1e-3)
    assert list(tmp_path.iterdir()) == []
