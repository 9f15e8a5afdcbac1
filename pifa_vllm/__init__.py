"""Low-rank compression of LLaMA models by MPIFA (arXiv 2501.19090), served by vLLM.

What is here, beside the command line: `compress` makes a checkpoint, `heal` makes a better one of it, `load` brings
one into transformers, and `factorize` brings a single matrix into pivoting form, a `PIFA` (pifa_vllm/README.md).
Each is imported when it is first asked for: vLLM imports this package in every process, for models that have
nothing to do with it, too.

Importing it registers the `pifa` quantizer with transformers as soon as transformers is imported (see
`pifa_vllm.hf`); it imports neither vLLM nor the compressor.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pifa_vllm.registration import register as _register

if TYPE_CHECKING:
    from pifa_vllm.compression.compress import compress
    from pifa_vllm.factorization import PIFA, factorize
    from pifa_vllm.healing.heal import heal
    from pifa_vllm.loading import load

__all__ = ["PIFA", "compress", "factorize", "heal", "load"]

__version__ = "0.1.0"

_HOMES = {
    "PIFA": "pifa_vllm.factorization",
    "compress": "pifa_vllm.compression.compress",
    "factorize": "pifa_vllm.factorization",
    "heal": "pifa_vllm.healing.heal",
    "load": "pifa_vllm.loading",
}

_register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
