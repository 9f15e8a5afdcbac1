"""Weights in large pages keep their values."""

import re
from pathlib import Path

import pytest
import torch

from pifa_vllm.ops.cpu import pages
from pifa_vllm.ops.cpu.pages import ask_for_large_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def bytes_in_large_pages(tensor):
    """Of the mapping that the middle of the tensor lies in, which may be more than the tensor."""
    address, found = tensor.data_ptr() + tensor.nbytes // 2, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the tensor is nowhere in memory")


def needs_large_pages():
    if not ENABLED.is_file() or "[never]" in ENABLED.read_text():
        pytest.skip("this kernel gives no large pages")
    if tuple(map(int, re.findall(r"\d+", Path("/proc/sys/kernel/osrelease").read_text())[:2])) < (6, 1):
        pytest.skip("this kernel replaces pages in its own time")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_replaced_and_values_are_not(dtype):
    needs_large_pages()
    weight = torch.randn(4096, 2048).to(dtype)
    before, address = weight.clone(), weight.data_ptr()
    ask_for_large_pages(weight)
    assert bytes_in_large_pages(weight) > weight.nbytes / 2
    assert weight.data_ptr() == address
    assert torch.equal(weight, before)


@pytest.mark.parametrize("numbers", [0, 1, 1 << 19, (1 << 19) + 1, 3_000_001])
def test_any_size_and_any_address(numbers):
    weight = torch.randn(numbers + 7)
    for offset in (0, 1, 7):
        part = weight[offset : offset + numbers]
        before = part.clone()
        ask_for_large_pages(part)
        assert torch.equal(part, before)


def test_a_kernel_without_large_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "_SIZE", tmp_path / "none")
    pages._page_size.cache_clear()
    weight = torch.zeros(1 << 20)
    try:
        ask_for_large_pages(weight)
    finally:
        pages._page_size.cache_clear()
    assert not weight.any()
