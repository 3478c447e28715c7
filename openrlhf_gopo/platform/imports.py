"""Imports of the stack: patches right after a module's import, without importing it now; and no search for garbage."""

from __future__ import annotations

import gc
import importlib.abc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]
Context = Callable[[], AbstractContextManager[Any]]


def install(patches: Mapping[str, Patch], contexts: Mapping[str, Context] | None = None) -> None:
    """Call ``patches[name](module)`` once ``name`` has been imported: now, if it has been already.

    A module in ``contexts`` is executed inside that context manager.
    """
    sys.meta_path.insert(0, _Finder(patches, contexts or {}))
    for name, patch in patches.items():
        if name in sys.modules:
            patch(sys.modules[name])


@contextmanager
def uncollected() -> Iterator[None]:
    """Within: no search for garbage. Imports leave next to none, and Python would look through all that they have made
    again and again, for a seventh of their time. Nor will it later: what is there at the end stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Asks the other finders, then wraps the execution of the module that they found."""

    def __init__(self, patches: Mapping[str, Patch], contexts: Mapping[str, Context]) -> None:
        self.patches = patches
        self.contexts = contexts

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.patches and name not in self.contexts:
            return None
        spec = self._ask_others(name, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(name, spec.loader)
        return spec

    def _ask_others(self, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                return spec
        return None

    def _wrap(self, name: str, loader: Any) -> None:
        execute = loader.exec_module  # the loader is of this one module, so setting an attribute on it is enough

        def exec_module(module: ModuleType) -> None:
            with self.contexts.get(name, nullcontext)():
                execute(module)
            if name in self.patches:
                self.patches[name](module)

        loader.exec_module = exec_module
