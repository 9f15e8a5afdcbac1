"""What an installation holds: a folder that pyproject.toml forgets is missing for everybody but its author."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def packages():
    """Every package to its folder; server/ is installed under another name."""
    for root, name in (("pifa_vllm", "pifa_vllm"), ("server", "pifa_vllm_server")):
        for path in (ROOT / root).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / root).parts
            yield ".".join((name, *parts)), path.parent


def test_every_package_is_installed():
    assert set(setuptools_table()["packages"]) == {name for name, _ in packages()}


@pytest.mark.parametrize(
    ("package", "folder", "pages"),
    [
        ("pifa_vllm", "pifa_vllm", "compression/report/templates"),
        ("pifa_vllm_server", "server", "dashboard/uplot"),
    ],
)
def test_the_pages_are_installed(package, folder, pages):
    patterns = setuptools_table()["package-data"][package]
    installed = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
    assert set((ROOT / folder / pages).iterdir()) <= installed
    if folder == "server":
        assert {
            p for p in (ROOT / "server/dashboard").iterdir() if p.suffix in (".css", ".html", ".js")
        } <= installed
    else:
        assert ROOT / "pifa_vllm/py.typed" in installed
