"""`python -m pifa_vllm.ops.cpu` compiles the CPU kernel ahead of its first use.

With `--portable` it is compiled for every kind of this machine's processors (see `build.TARGETS`): what an image
needs that has no compiler and runs elsewhere.
"""

import platform
import sys

from pifa_vllm.errors import PifaError
from pifa_vllm.ops.cpu.build import TARGETS, build

portable = [name for name, target in TARGETS.items() if target.machine == platform.machine()]
try:
    for name in portable if "--portable" in sys.argv[1:] else [None]:
        print(f"CPU kernel: {build(name)}")
except PifaError as error:
    sys.exit(f"pifa-vllm: {error}")
