"""Environments by name: a built-in one, an entry point of another package, or ``path/to/file.py:ClassName``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import ConfigError

__all__ = ["Dialogue", "Environment", "load_environment"]

BUILTIN = {
    "shop": "openrlhf_gopo.envs.shop:Shop",
    "star": "openrlhf_gopo.envs.star:Star",
    "abcd": "openrlhf_gopo.envs.abcd:Abcd",
    "multiwoz": "openrlhf_gopo.envs.multiwoz:Multiwoz",
}
ENTRY_POINTS = "openrlhf_gopo.envs"


def load_environment(name: str, data: str | None = None) -> Environment:
    """Resolve ``--gopo.env`` and load it with ``--gopo.data``.

    Raises:
        ConfigError: no such environment, or what was named is not an ``Environment``.
        DataError: the environment rejects ``data``.
    """
    cls = _resolve(name)
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        raise ConfigError(f"--gopo.env {name}: {cls!r} is not a subclass of openrlhf_gopo.envs.Environment")
    return cls.load(data)


def _resolve(name: str) -> object:
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(name, Path(path), attribute)
    registered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in registered:
        return registered[name].load()
    known = ", ".join(sorted({*BUILTIN, *registered}))
    raise ConfigError(f"--gopo.env {name}: no such environment; choose one of {known}, or path/to/file.py:ClassName")


def _from_file(name: str, path: Path, attribute: str) -> object:
    if not path.is_file():
        raise ConfigError(f"--gopo.env {name}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"gopo_env_{path.stem}", path)
    assert spec is not None  # a .py path always has a spec
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ConfigError(f"--gopo.env {name}: {path} defines no {attribute}")
    return getattr(module, attribute)
