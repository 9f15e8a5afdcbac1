"""What an installation holds: a folder that pyproject.toml forgets is missing for everybody but its author."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_installed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pifa_vllm").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"pifa_vllm_server"}
    assert set(setuptools_table()["packages"]) == expected


def test_the_pages_templates_are_installed():
    package = ROOT / "pifa_vllm"
    (patterns,) = setuptools_table()["package-data"].values()
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert set((package / "compress/report/templates").iterdir()) <= installed
    assert package / "py.typed" in installed
