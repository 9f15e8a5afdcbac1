"""What is published: a wheel and a source distribution with what belongs in them, and one version everywhere."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from pifa_vllm import __version__

ROOT = Path(__file__).parents[1]
NAME = f"pifa_vllm-{__version__}"
# What a careless pattern would take along.
STRAYS = (
    "build/lib/pifa_vllm/gone.py",
    "pifa_vllm/__pycache__/cli.cpython-311.pyc",
    "pifa_vllm/bench/results/unfinished.json",
    "pifa_vllm/ops/cpu/linear.so",
    "pifa_vllm/notes.md",
    "server/dashboard/chat.js.orig",
    "server/results/soak.json",
    "tests/test_more.py",
)

INSTALLED = """
import importlib.metadata, runpy, sys
from pathlib import Path
import pifa_vllm, pifa_vllm_server.app
from pifa_vllm_server.dashboard.page import build_page
for module in (pifa_vllm, pifa_vllm_server):
    assert Path(module.__file__).is_relative_to(sys.prefix), module
(plugin,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "pifa")
assert plugin.dist.version == pifa_vllm.__version__
assert "<script>" in build_page().html
runpy.run_path(sys.argv[1])
"""


def tracked():
    """Every file of the repository; files that are new count, files that git ignores do not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def is_installed(path):
    """Whether this file of the repository is for those who run the code, not for those who read it."""
    is_page = path.suffix == ".md" and path.parent.name != "templates"
    apart = {"examples", "results", "screenshots"} & set(path.parts)
    return path.parts[0] in ("pifa_vllm", "server") and not is_page and not apart


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both distributions, the wheel made from the other."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    tree = tmp_path_factory.mktemp("tree")
    for path in tracked():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes((ROOT / path).read_bytes())
    for stray in STRAYS:
        assert not (tree / stray).exists()
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_text("stray\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


def test_the_wheel_holds_what_runs(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        found = set(wheel.namelist())
    expected = {
        re.sub("^server/", "pifa_vllm_server/", str(path)) for path in tracked() if is_installed(path)
    }
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    assert found == expected | {f"{NAME}.dist-info/{name}" for name in about}
    assert {Path(name).suffix for name in expected} >= {".cpp", ".css", ".h", ".html", ".js", ".md", ".toml"}


def test_the_source_distribution_holds_what_the_wheel_is_made_of(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        found = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    front = {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found if not name.startswith("pifa_vllm.egg-info/")} == front | made | {
        str(path) for path in tracked() if is_installed(path)
    }


@pytest.mark.vllm
def test_an_installed_wheel_has_the_command_the_plugin_and_the_server(built, tmp_path):
    """In an environment that sees the packages of this one, but not its way to the source tree."""
    pytest.importorskip("vllm")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # Packages that such a line leads to are found; further lines of this kind beside them are not read.
    (site / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, str(built / f"{NAME}-py3-none-any.whl")], check=True)

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(tmp_path / "venv/bin/pifa-vllm", "--version") == f"pifa-vllm {__version__}\n"
    assert "pifa_vllm.plugin.config" in run(python, "-c", INSTALLED, str(ROOT / "deploy/check_plugin.py"))


def test_the_version_is_the_same_everywhere():
    """The server, the command line and pyproject.toml read it from the package."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    first = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == __version__
