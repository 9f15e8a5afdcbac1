"""Compiling the CPU kernel: the cache, and what happens where it cannot be compiled."""

import logging
import subprocess
import sys

import pytest

from pifa_vllm.errors import PifaError
from pifa_vllm.ops.cpu import build as module
from pifa_vllm.ops.cpu.build import TARGETS, build, cache_directory, load, prebuilt


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_VLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_it_is_asked_to_be(monkeypatch, tmp_path):
    monkeypatch.delenv("PIFA_VLLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "pifa-vllm"
    monkeypatch.setenv("PIFA_VLLM_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_it_is_compiled_once_and_again_for_other_sources(empty_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_compile", lambda compiler, flags, path: (calls.append(path), path.touch()))
    first = build()
    assert build() == first
    assert len(calls) == 1
    monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-DOTHER"))
    assert build() != first
    assert len(calls) == 2


def test_a_compiler_that_fails_leaves_nothing_and_says_why(empty_cache, monkeypatch):
    monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-fno-such-flag"))
    with pytest.raises(PifaError, match="no-such-flag"):
        build()
    assert not list(empty_cache.glob("*.so"))


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_the_reason_is_given(empty_cache, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(PifaError, match="compiler"):
        build()


V3 = "flags : abm avx2 bmi1 bmi2 f16c fma movbe sse4_2"
V4 = V3 + " avx512bw avx512cd avx512dq avx512f avx512vl"


@pytest.mark.parametrize(
    ("cpuinfo", "target"),
    [
        (V3, "x86-64-v3"),
        (V4, "x86-64-v4"),
        (V4.replace("avx512vl", ""), "x86-64-v3"),
        (V4 + " avx512_bf16 amx_tile", "x86-64-v4-bf16"),
        (V3 + " avx512_bf16", "x86-64-v3"),
        (V3.replace(" fma", ""), None),
        ("Features : fp asimd", "armv8-a"),
    ],
)
def test_the_best_portable_build_that_the_processor_can_run(empty_cache, monkeypatch, cpuinfo, target):
    monkeypatch.setattr(module, "_compile", lambda compiler, flags, path: path.touch())
    monkeypatch.setattr(module, "_processor", lambda: cpuinfo)
    assert prebuilt() is None
    for name in TARGETS:
        build(name)
    found = prebuilt()
    assert found == (build(target) if target else None)


def test_a_portable_build_of_another_torch_or_source_is_not_taken(empty_cache, monkeypatch):
    monkeypatch.setattr(module, "_compile", lambda compiler, flags, path: path.touch())
    monkeypatch.setattr(module, "_processor", lambda: V3)
    build("x86-64-v3")
    assert prebuilt()
    with monkeypatch.context() as other:
        other.setattr(module.torch, "__version__", "0.0")
        assert prebuilt() is None
    with monkeypatch.context() as other:
        other.setattr(module, "_FLAGS", (*module._FLAGS, "-DOTHER"))
        assert prebuilt() is None


def test_without_a_compiler_a_portable_build_is_taken_and_its_flags_are_the_targets(empty_cache, monkeypatch):
    flags_of = []
    monkeypatch.setattr(
        module, "_compile", lambda compiler, flags, path: (flags_of.append(flags), path.touch())
    )
    monkeypatch.setattr(module, "_processor", lambda: V3)
    portable = build("x86-64-v3")
    assert "-march=x86-64-v3" in flags_of[0]
    assert "-march=native" not in flags_of[0]
    assert module._library() == build() != portable  # a compiler makes a better one
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert module._library() == portable


def test_without_the_kernel_the_torch_ops_serve(tmp_path):
    """In a process of its own: a loaded kernel cannot be unloaded."""
    program = """
import torch
from pifa_vllm.ops import pifa_linear
from pifa_vllm.ops.cpu import load
assert not load()
w = torch.randn(6, 4)
for dtype in (torch.float32, torch.float16):
    y = pifa_linear(torch.ones(2, 4, dtype=dtype), w.to(dtype), w.new_empty(0).to(dtype), None, [6], [6])
    torch.testing.assert_close(y.float(), torch.ones(2, 4) @ w.T, atol=1e-2, rtol=0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"CXX": "/no/such/compiler", "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "several times slower" in done.stderr


def test_load_is_quiet_when_it_succeeds(caplog):
    with caplog.at_level(logging.WARNING):
        assert load()
    assert not caplog.records
