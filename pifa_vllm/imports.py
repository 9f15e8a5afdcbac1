"""Something to be done as soon as a module is imported, and not before: importing it may cost seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call something once a module is there: now, or after whoever imports it first.

    Args:
        name: of the module. If it turns out to be no ordinary Python file, nothing is called.
        action: must not raise. The same one is kept once only.
    """
    if name in sys.modules:
        action()
    elif not any(isinstance(f, _Finder) and (f.name, f.action) == (name, action) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Waits for its module, lets it load as usual, and steps aside."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
            return None  # not an ordinary file: left to the others
        return spec_from_file_location(
            fullname, spec.origin, loader=_Loader(fullname, spec.origin, self.action)
        )


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, action: Callable[[], None]) -> None:
        super().__init__(fullname, path)
        self._action = action

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._action()
