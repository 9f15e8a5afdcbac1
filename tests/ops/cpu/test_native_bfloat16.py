"""The path of processors with bfloat16 products of their own, compiled in on any processor."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from pifa_vllm.ops import pifa_linear
from pifa_vllm.ops.cpu import build
from tests.ops.factors import ODD_SHAPES, Layer, check

build._FLAGS = (*build._FLAGS, "-O1", "-DPIFA_NATIVE_BFLOAT16")
assert build.load()
for ranks, out_features, n in ODD_SHAPES:
    for tokens in (4, 40):
        layer = Layer.random(ranks, out_features, n, torch.bfloat16, with_bias=tokens == 40)
        x = torch.randn(tokens, n).bfloat16()
        check(pifa_linear(x, *layer.arguments()), layer.expected(x), torch.bfloat16)
weight, x = torch.randn(9, 5).bfloat16(), torch.randn(40, 5).bfloat16()
check(pifa_linear(x, weight, weight.new_empty(0), None, [9], [9]), x.double() @ weight.double().T, torch.bfloat16)
"""


def test_many_tokens_go_to_the_library():
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
