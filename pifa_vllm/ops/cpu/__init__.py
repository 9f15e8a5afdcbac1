"""The CPU kernel of `pifa::linear`: C++, compiled on the machine that runs it, once."""

from pifa_vllm.ops.cpu.build import load

__all__ = ["load"]
