"""What only other processors take, compiled in on any: vectors of 16 floats, and the library for bfloat16."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from pifa_vllm.ops import pifa_linear
from pifa_vllm.ops.cpu import build
from tests.ops.factors import ODD_SHAPES, Layer, check

build._FLAGS = (*build._FLAGS, "-O1", "-DPIFA_NATIVE_BFLOAT16", "-DPIFA_LANES=16")
assert build.load()
for ranks, out_features, n in ODD_SHAPES:
    for tokens in (1, 4, 8, 9, 20, 40, 70):
        for dtype in (torch.float32, torch.bfloat16):
            layer = Layer.random(ranks, out_features, n, dtype, with_bias=tokens == 40)
            x = torch.randn(tokens, n).to(dtype)
            check(pifa_linear(x, *layer.arguments()), layer.expected(x), dtype)
for tokens in (1, 4, 5, 8, 9, 70):
    for stored in (torch.int8, torch.uint8):
        arguments, stands_for = Layer.random([270, 33], [600, 40], 520).quantized(stored, torch.int8, 64)
        x = torch.randn(tokens, 520)
        check(pifa_linear(x, *arguments), stands_for.expected(x), torch.float32, 1e-4)
# So large that the library has them from five tokens on.
layer, x = Layer.random([700, 300], [1000, 400], 900, torch.bfloat16), torch.randn(5, 900).bfloat16()
check(pifa_linear(x, *layer.arguments()), layer.expected(x), torch.bfloat16)
for stored, group in ((torch.int8, 0), (torch.int8, 128), (torch.uint8, 32), (torch.uint8, 256)):
    arguments, stands_for = Layer.random([270, 0, 33], [600, 5, 40], 523).quantized(stored, torch.int8, group)
    x = torch.randn(130, 523).bfloat16()
    check(pifa_linear(x, *arguments), stands_for.expected(x), torch.bfloat16)
weight, x = torch.randn(9, 5).bfloat16(), torch.randn(40, 5).bfloat16()
check(pifa_linear(x, weight, weight.new_empty(0), None, [9], [9]), x.double() @ weight.double().T, torch.bfloat16)
"""


def test_wide_vectors_and_the_library():
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
