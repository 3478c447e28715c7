"""What a flag names: built in, an entry point of another package, or ``path/to/file.py:Name``. Stdlib only."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from openrlhf_gopo.errors import ConfigError


def find_class(
    flag: str, name: str, base: type, group: str, what: str, builtin: Mapping[str, str], others: tuple[str, ...] = ()
) -> Any:
    """The subclass of ``base`` that ``flag`` names.

    Args:
        group: entry-point group. what: what the class is, for messages. builtin: name to ``module:attribute``.
        others: names that the caller resolves itself, for messages.

    Raises:
        ConfigError: there is none, or what was named is something else.
    """
    found = _find(flag, name, group, what, builtin, (*others, "or path/to/file.py:ClassName"))
    if not (isinstance(found, type) and issubclass(found, base)):
        public = base.__module__.rpartition(".")[0]  # openrlhf_gopo.envs re-exports what envs/base.py defines
        raise ConfigError(f"{flag} {name}: {found!r} is not a subclass of {public}.{base.__name__}")
    return found


def find_callable(flag: str, name: str, group: str, what: str, others: tuple[str, ...]) -> Callable[..., Any]:
    """The callable that ``flag`` names; a class is built without arguments. See ``find_class``.

    Raises:
        ConfigError: there is none, or what was named cannot be called.
    """
    found = _find(flag, name, group, what, {}, (*others, "or path/to/file.py:name"))
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise ConfigError(f"{flag} {name}: {found!r:.80} cannot be called; a {what} is a function, or a class with one")
    return found


def _find(flag: str, name: str, group: str, what: str, builtin: Mapping[str, str], others: tuple[str, ...]) -> object:
    if name in builtin:
        module, _, attribute = builtin[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(f"{flag} {name}", Path(path), attribute)
    registered = {point.name: point for point in entry_points(group=group)}
    if name in registered:
        return registered[name].load()
    *known, form = others
    known = sorted({*builtin, *known, *registered})
    raise ConfigError(f"{flag} {name}: no such {what}; choose one of {', '.join([*known, form])}")


def _from_file(given: str, path: Path, attribute: str) -> object:
    if not os.path.isfile(path):  # False too for a name that is too long, where Path.is_file raises
        raise ConfigError(f"{given}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"gopo_plugin_{path.stem}", path)
    assert spec is not None  # a .py path always has a spec
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ConfigError(f"{given}: {path} defines no {attribute}")
    return getattr(module, attribute)
