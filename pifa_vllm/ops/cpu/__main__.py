"""`python -m pifa_vllm.ops.cpu` compiles the CPU kernel ahead of its first use."""

import sys

from pifa_vllm.errors import PifaError
from pifa_vllm.ops.cpu.build import build

try:
    print(f"CPU kernel: {build()}")
except PifaError as error:
    sys.exit(f"pifa-vllm: {error}")
