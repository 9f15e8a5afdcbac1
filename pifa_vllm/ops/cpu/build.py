"""Compiling and loading the CPU kernel.

It is compiled for the processor and the torch that it will run with, on first use, and kept in a cache. An image
without a C++ compiler runs on processors that nobody knew when it was built: its cache holds portable builds (see
`TARGETS`), of which the best that the processor can run is taken. Without either, the plain torch ops serve.
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
from dataclasses import dataclass
from pathlib import Path

import torch

from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.errors import PifaError

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wno-psabi")
_NATIVE = ("-march=native",)
_logger = logging.getLogger("pifa_vllm")


@dataclass(frozen=True)
class Target:
    """A kind of processor that a kernel can be compiled for ahead of knowing which one will run it.

    Attributes:
        machine: as `platform.machine()` names it.
        flags: of the compiler.
        features: what /proc/cpuinfo must list; it lists only what the operating system has enabled, too.
    """

    machine: str
    flags: tuple[str, ...]
    features: frozenset[str]


_X86_64_V3 = frozenset(("abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"))
_X86_64_V4 = _X86_64_V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
# Best first. bfloat16 products of its own are what the kernel leaves large bfloat16 matrices to oneDNN for.
TARGETS = {
    "x86-64-v4-bf16": Target("x86_64", ("-march=x86-64-v4", "-mavx512bf16"), _X86_64_V4 | {"avx512_bf16"}),
    "x86-64-v4": Target("x86_64", ("-march=x86-64-v4",), _X86_64_V4),
    "x86-64-v3": Target("x86_64", ("-march=x86-64-v3",), _X86_64_V3),
    "armv8-a": Target("aarch64", ("-march=armv8-a",), frozenset(("asimd",))),
}


@functools.cache
def load() -> bool:
    """Make `pifa::linear` run the C++ kernel on CPUs, compiling it first if need be (some 20 seconds).

    Returns:
        Whether it does. If not, the reason was logged, and the op runs the plain torch ops.
    """
    try:
        torch.ops.load_library(str(_library()))  # type: ignore[no-untyped-call]  # torch has no annotations here
    except (PifaError, OSError) as error:
        _logger.warning("%s PIFA layers run as plain torch ops on this CPU, several times slower.", error)
        return False
    return True


def build(target: str | None = None) -> Path:
    """Compile the kernel, unless the cache has it.

    Args:
        target: a key of `TARGETS` that this machine's compiler knows; None compiles for this very processor.

    Returns:
        The shared library.

    Raises:
        PifaError: if there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise PifaError("No C++ compiler was found for the CPU kernel (g++, clang++ or $CXX).")
    flags = (*_FLAGS, *(_NATIVE if target is None else TARGETS[target].flags))
    library = _portable_path(target) if target else cache_directory() / f"linear-{_native_key(compiler)}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            # Several workers start at once; one compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _logger.info("compiling the CPU kernel for %s (once)", target or "this machine")
                replace_file(library, functools.partial(_compile, compiler, flags))
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


def prebuilt() -> Path | None:
    """Return the best portable build in the cache that fits this processor, torch and source, or None."""
    features = set(_processor().split())
    fitting = [name for name, target in TARGETS.items() if target.features <= features]
    return next((path for path in map(_portable_path, fitting) if path.is_file()), None)


def _library() -> Path:
    try:
        return build()
    except PifaError:
        library = prebuilt()
        if library is None:
            raise
    _logger.info("the CPU kernel is the portable %s", library.name)
    return library


def _portable_path(target: str) -> Path:
    # Not the compiler's version: whoever looks for it may have none.
    return cache_directory() / f"linear-{target}-{_key(*TARGETS[target].flags)}.so"


def _native_key(compiler: str) -> str:
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PifaError(f"The C++ compiler {compiler} does not run ({error}).") from error
    return _key(version.stdout, platform.machine(), _processor(), *_NATIVE)


def _key(*parts: str) -> str:
    """Hash everything that the machine code depends on: the parts, torch, the flags and the source."""
    sources = [source.read_text(encoding="utf-8") for source in sorted(_SOURCES.glob("*.[hc]*"))]
    everything = "\0".join((*parts, torch.__version__, *_FLAGS, *sources))
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the line of cpuinfo that lists this processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, flags: tuple[str, ...], output: Path) -> None:
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, *flags, abi, *includes, str(_SOURCES / "linear.cpp"), "-o", str(output), *libraries]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise PifaError(f"{compiler} could not compile the CPU kernel:\n{last}\n")
