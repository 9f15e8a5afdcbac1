"""The CPU kernel of `pifa::linear`: C++, compiled on the machine that runs it, once."""

from pifa_vllm.ops.cpu.build import load
from pifa_vllm.ops.cpu.pages import ask_for_large_pages

__all__ = ["ask_for_large_pages", "load"]
