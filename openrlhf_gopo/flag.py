"""Flags as fields of dataclasses: a field's default, help and choices are the flag's. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
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


def check_choices(config: Any, prefix: str) -> None:
    for f in flags(type(config)):
        choices = f.metadata["choices"]
        if choices:
            value = getattr(config, f.name)
            require(value in choices, f"--{prefix}.{f.name}", value, f"choose one of {', '.join(choices)}")


def require(ok: bool, name: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{name} {value}: {remedy}")
