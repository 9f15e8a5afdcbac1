"""`python -m pifa_vllm` is `pifa-vllm`."""

import sys

from pifa_vllm.cli import main

sys.exit(main())
