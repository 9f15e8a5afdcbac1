"""Imports point one way, as the contracts in pyproject.toml say."""

import tomllib
from pathlib import Path

import pytest

linter = pytest.importorskip("importlinter.cli")

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"


def test_the_contracts_are_kept(capsys):
    status = linter.lint_imports(config_filename=str(PYPROJECT), no_cache=True)
    assert status == linter.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_every_room_has_its_place():
    rooms = {
        f"pifa_vllm.{path.stem}"
        for path in (ROOT / "pifa_vllm").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    contracts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    placed = {room.strip() for layer in contracts[0]["layers"] for room in layer.split("|")}
    assert placed == rooms - {"pifa_vllm.__init__"} | {"pifa_vllm_server"}
