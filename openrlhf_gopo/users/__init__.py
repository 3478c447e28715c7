"""User simulators by name: ``--gopo.user``, one or a mixture by weight as in ``agenda=0.7,llm:MODEL@URL=0.3``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from openrlhf_gopo.config import LlmConfig
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.plugins import find_class
from openrlhf_gopo.users.base import AsDrafted, Cue, Share, Users, UserSimulator, Voice

__all__ = ["Cue", "UserSimulator", "UserSpec", "Users", "Voice", "load_users"]

ENTRY_POINTS = "openrlhf_gopo.users"
OWN = ("agenda", "replay")  # simulators that are part of an environment


@dataclass(frozen=True)
class UserSpec:
    """``--gopo.user``, the settings of ``llm:MODEL@URL``, and --gopo.user_timeout in seconds."""

    user: str
    llm: LlmConfig = field(default_factory=LlmConfig)
    timeout: float = 60.0


def load_users(spec: UserSpec, own: str | None, env: str) -> Users:
    """The simulators that ``spec`` names, for the environment ``env`` whose own simulator is ``own``.

    Raises:
        ConfigError: no such simulator, a mixture that cannot be read, or ``env`` has no simulator to exchange.
    """
    mixture = parse_mixture(spec.user)
    if own is None:
        raise ConfigError(
            f"--gopo.user {spec.user}: the environment {env} words its customers itself; leave --gopo.user out"
        )
    return Users([Share(name, _simulator(name, spec, own, env), weight) for name, weight in mixture.items()])


def parse_mixture(text: str) -> dict[str, float]:
    """Simulators and weights.

    >>> parse_mixture("agenda=3, llm:qwen@http://localhost:8000/v1=1")
    {'agenda': 3.0, 'llm:qwen@http://localhost:8000/v1': 1.0}

    Raises:
        ConfigError: nothing named, a name twice, a weight that is not a positive number, or some without a weight.
    """
    items = [item for part in text.split(",") if (item := part.strip())]
    weights: dict[str, float] = {}
    for item in items:
        name, weight = _weighed(item)
        if weight is None and len(items) > 1:
            raise ConfigError(f"{_given(item)}: in a mixture every simulator has a weight, as in agenda=0.7")
        if weight is not None and not 0 < weight < math.inf:
            raise ConfigError(f"{_given(item)}: the weight must be a positive number, as in agenda=0.7")
        if name in weights:
            raise ConfigError(f"{_given(name)}: named twice; add its weights up")
        weights[name] = 1.0 if weight is None else weight
    if not weights:
        raise ConfigError(f"--gopo.user {text!r}: name a simulator: agenda, replay, llm:MODEL@URL, or file.py:Class")
    return weights


def _weighed(item: str) -> tuple[str, float | None]:
    """Name and weight; what follows the last "=" is a weight only if it is a number, names may hold one too."""
    name, equals, weight = item.rpartition("=")
    try:
        return (name.strip(), float(weight)) if equals else (item, None)
    except ValueError:
        return item, None


def _given(name: str) -> str:
    """The flag with one simulator. A URL is left out: a mistyped one may carry a password."""
    return f"--gopo.user {name.partition('@')[0]}"


def _simulator(name: str, spec: UserSpec, own: str, env: str) -> UserSimulator:
    if name == own:
        return AsDrafted()
    if name in OWN:
        raise ConfigError(f"--gopo.user {name}: the own simulator of {env} is {own}; give {own} or llm:MODEL@URL")
    if name.startswith("llm:"):
        from openrlhf_gopo.users.llm import LlmUser

        return LlmUser.from_name(name, spec.llm, spec.timeout)
    others = (own, "llm:MODEL@URL")
    return find_class("--gopo.user", name, UserSimulator, ENTRY_POINTS, "user simulator", {}, others)()
