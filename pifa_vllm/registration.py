"""Registers `pifa_vllm.hf` with transformers when transformers loads its quantizers, and not before.

transformers has no entry points for quantizers, and importing them takes seconds, most of them for torch.
Paying that in `import pifa_vllm` would slow down every `pifa-vllm --help` and every process that looks for
vLLM plugins. So either the quantizers are there already and ours joins them at once, or a finder waits for
that module, lets it load as usual, and steps aside.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

# The module with the table of quantizers; whatever loads a model with weights imports it.
_QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Make transformers know the `pifa` quantizer, now or as soon as it loads its own. Idempotent."""
    if _QUANTIZERS in sys.modules:
        _import_hf()
    elif not any(isinstance(finder, _QuantizersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuantizersFinder())


class _QuantizersFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
            return None  # not an ordinary file: let the others find it, unregistered
        return spec_from_file_location(fullname, spec.origin, loader=_QuantizersLoader(fullname, spec.origin))


class _QuantizersLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _import_hf()


def _import_hf() -> None:
    try:
        importlib.import_module("pifa_vllm.hf")
    except Exception as error:
        # Whatever is wrong with ours, other models must go on loading.
        warnings.warn(f"transformers will not load PIFA checkpoints: {error!r}", stacklevel=2)
