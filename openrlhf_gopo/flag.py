"""Flags as fields of dataclasses: a field's default, help and choices are the flag's. Standard library only."""

from __future__ import annotations

import argparse
import math
from collections.abc import Container, Iterator
from dataclasses import MISSING, Field, field, fields
from typing import Any

from openrlhf_gopo.errors import ConfigError


def flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None, kind: type | None = None) -> Any:
    """A dataclass field that is also a command-line flag; ``kind`` is needed where the default is None."""
    return field(default=default, metadata={"help": help, "choices": choices, "kind": kind or type(default)})


def flags(cls: type) -> Iterator[Field]:
    """The fields of a config dataclass that are flags, in order."""
    return (f for f in fields(cls) if "help" in f.metadata)


def default(f: Field) -> Any:
    """The flag's default value."""
    assert f.default is not MISSING  # every flag() has one
    return f.default


def add_flags(group: argparse._ActionsContainer, cls: type, prefix: str, names: Container[str] | None = None) -> None:
    """The flags of a config dataclass, or those of its fields that are in ``names``."""
    for f in flags(cls):
        name, meta = f"--{prefix}.{f.name}", f.metadata
        if names is not None and f.name not in names:
            continue
        if meta["kind"] is bool:
            group.add_argument(name, action="store_true", default=default(f), help=meta["help"])
        else:
            group.add_argument(name, type=meta["kind"], default=default(f), choices=meta["choices"], help=meta["help"])


def check_values(config: Any, prefix: str) -> None:
    """What holds for every flag of a kind: one of its choices, no NaN and no infinity."""
    for f in flags(type(config)):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"--{prefix}.{f.name}", value, "give a finite number")
        if choices:
            require(value in choices, f"--{prefix}.{f.name}", value, f"choose one of {', '.join(choices)}")


def require(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Raise a ConfigError that names the flag, its value and the remedy, unless ``ok``."""
    if not ok:
        shown = str(value)
        raise ConfigError(f"{name} {shown if len(shown) <= 200 else shown[:197] + '...'}: {remedy}")
