"""Compiling and loading the CPU kernel.

It is compiled for the processor and the torch that it will run with, on first use, and kept in a cache. Without a
C++ compiler (which vLLM's CPU backend and torch.compile need, too) the plain torch ops go on serving.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.errors import PifaError

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wno-psabi")
_logger = logging.getLogger("pifa_vllm")


@functools.cache
def load() -> bool:
    """Make `pifa::linear` run the native kernel on CPUs, compiling it first if need be (some 20 seconds).

    Returns:
        Whether it does. If not, the reason was logged, and the op runs the plain torch ops.
    """
    try:
        torch.ops.load_library(str(build()))  # type: ignore[no-untyped-call]  # torch has no annotations here
    except (PifaError, OSError) as error:
        _logger.warning("%s PIFA layers run as plain torch ops on this CPU, several times slower.", error)
        return False
    return True


def build() -> Path:
    """Compile the kernel, unless the cache has it.

    Returns:
        The shared library.

    Raises:
        PifaError: if there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise PifaError("No C++ compiler was found for the CPU kernel (g++, clang++ or $CXX).")
    library = cache_directory() / f"linear-{_key(compiler)}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            # Several workers start at once; one compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _logger.info("compiling the CPU kernel for this machine (once)")
                replace_file(library, functools.partial(_compile, compiler))
    except OSError as error:
        raise PifaError(
            f"{library}: the CPU kernel cannot be written there ({error.strerror}); PIFA_VLLM_CACHE names "
            "another directory."
        ) from error
    return library


def cache_directory() -> Path:
    """Where compiled kernels are kept: $PIFA_VLLM_CACHE, or pifa-vllm in the user's cache directory."""
    own = os.environ.get("PIFA_VLLM_CACHE")
    return (
        Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pifa-vllm"
    )


def _key(compiler: str) -> str:
    """Everything that the machine code depends on."""
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PifaError(f"The C++ compiler {compiler} does not run ({error}).") from error
    parts = [version.stdout, torch.__version__, platform.machine(), _processor(), *_FLAGS]
    parts += [source.read_text(encoding="utf-8") for source in sorted(_SOURCES.glob("*.[hc]*"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The instruction sets of this processor, which -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, output: Path) -> None:
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, *_FLAGS, abi, *includes, str(_SOURCES / "linear.cpp"), "-o", str(output), *libraries]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise PifaError(f"{compiler} could not compile the CPU kernel:\n{last}\n")
