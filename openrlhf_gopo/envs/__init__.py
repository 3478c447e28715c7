"""Environments by name: a built-in one, an entry point of another package, or ``path/to/file.py:ClassName``."""

from __future__ import annotations

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.envs.guided import GuidedDialogue
from openrlhf_gopo.plugins import find_class
from openrlhf_gopo.users import UserSpec, load_users

__all__ = ["Dialogue", "Environment", "GuidedDialogue", "load_environment"]

BUILTIN = {
    "shop": "openrlhf_gopo.envs.shop:Shop",
    "star": "openrlhf_gopo.envs.star:Star",
    "abcd": "openrlhf_gopo.envs.abcd:Abcd",
    "multiwoz": "openrlhf_gopo.envs.multiwoz:Multiwoz",
}
ENTRY_POINTS = "openrlhf_gopo.envs"


def load_environment(name: str, data: str | None = None, user: UserSpec | None = None) -> Environment:
    """Resolve ``--gopo.env``, load it with ``--gopo.data``, and give it the simulators of ``--gopo.user``, if any.

    Raises:
        ConfigError: no such environment, what was named is not an ``Environment``, or it cannot take this user.
        DataError: the environment rejects ``data``.
    """
    cls = find_class("--gopo.env", name, Environment, ENTRY_POINTS, "environment", BUILTIN)
    env = cls.load(data)
    if user is not None:
        env.users = load_users(user, env.own_user, env.name)
        env.blocking = env.blocking or env.users.blocking
    return env
