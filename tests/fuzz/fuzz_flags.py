"""What an endpoint answers, and what a user writes after a flag."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import fields
from functools import cache
from typing import Any

from kit import SCRATCH, Target, Wrong
from mutate import Mutator

from openrlhf_gopo.config import GopoConfig, JudgeConfig, LlmConfig, PreferenceConfig, default, flags, from_flags
from openrlhf_gopo.endpoint import Endpoint
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.rewards.joint import parse_weights
from openrlhf_gopo.users import load_users, parse_mixture

ANSWER = {
    "choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


@cache
def _endpoint(path: str | None = None) -> Endpoint:
    return Endpoint("--gopo.user llm", "m", "http://localhost:9/v1", LlmConfig(cache=path, budget_tokens=10**18))


def _answer(data: bytes) -> None:
    answer = _endpoint()._read(data)
    if not isinstance(answer.text, str) or not isinstance(answer.cut, bool):
        raise Wrong(f"{answer!r:.200}")


def _kept(text: str) -> None:
    """An answer out of a cache that somebody else wrote."""
    path = str(SCRATCH / "answers.sqlite")
    endpoint, data = _endpoint(path), text.encode("utf-8", "replace")
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        keys = [row[0] for row in base.execute("SELECT request FROM answers")]
        if not keys:
            endpoint._poster.post = lambda *_, **__: json.dumps(ANSWER).encode()  # type: ignore[method-assign]
            endpoint.chat([], 0, 1e12)
        base.execute("UPDATE answers SET answer = ?", (data if len(data) % 7 else data.decode(),))
    answer = endpoint.chat([], 0, 1e12)
    if not isinstance(answer.text, str) or not isinstance(answer.cut, bool):
        raise Wrong(f"{answer!r:.200}")


def _weights(text: str) -> None:
    if not parse_weights(text):
        raise Wrong("no weights")


def _mixture(text: str) -> None:
    parse_mixture(text)


def _user(text: str) -> None:
    from openrlhf_gopo.users import UserSpec

    load_users(UserSpec(text), "agenda", "shop")


def _env(text: str) -> None:
    load_environment(text, None)


_FLAGS = {
    f"{prefix}.{f.name}": f
    for cls, prefix in (
        (GopoConfig, "gopo"),
        (PreferenceConfig, "gopo.pref"),
        (LlmConfig, "gopo.llm"),
        (JudgeConfig, "gopo.judge"),
    )
    for f in flags(cls)
}
_NUMBERS = (-1.0, 0.0, 0.5, 1.0, 1e308, float("nan"), float("inf"), float("-inf"), -0.0)


def _flags(m: Mutator) -> dict[str, Any]:
    values = {name: default(f) for name, f in _FLAGS.items()} | {"gopo.env": "shop"}
    for name in m.rng.sample(sorted(_FLAGS), m.rng.choice((1, 2, 5))):
        kind = _FLAGS[name].metadata["kind"]
        made = {
            bool: lambda: m.rng.random() < 0.5,
            int: lambda: m.rng.choice((-1, 0, 1, 2, 10**30)),
            float: lambda: m.rng.choice(_NUMBERS),
        }
        choices = _FLAGS[name].metadata["choices"]
        values[name] = m.rng.choice(choices) if choices and m.rng.random() < 0.7 else made.get(kind, m.text)()
    if m.rng.random() < 0.3:
        values["gopo.llm.extra_body"] = m.json({"top_p": 1, "max_tokens": None}).decode("utf-8", "replace")
    return values


def _config(values: dict[str, Any]) -> None:
    config = from_flags(values)
    for f in fields(LlmConfig):
        number = getattr(config.llm, f.name)
        if isinstance(number, float) and not number < float("inf"):
            raise Wrong(f"--gopo.llm.{f.name} {number}")
    for step in range(3):
        if not set(config.learners(step)) <= {"expert", "responder"}:
            raise Wrong("learners")


TARGETS = (
    Target(
        "cached answers (endpoint)",
        0.01,
        lambda m: m.json({"text": "Hi", "cut": False}).decode("utf-8", "replace"),
        _kept,
    ),
    Target("endpoint answers (endpoint)", 0.3, lambda m: m.json(ANSWER), _answer),
    Target("reward weights", 0.15, lambda m: m.text("tse=1,gre=0.5"), _weights),
    Target("user mixtures", 0.12, lambda m: m.text("agenda=3,llm:m@http://h:1/v1=1"), _mixture),
    Target("users by name", 0.0005, lambda m: m.text("llm:m@http://localhost:1/v1"), _user),
    Target("environments by name", 0.002, lambda m: m.text(m.rng.choice(("a.py:B", "star", "x/y.py:"))), _env),
    Target("flags (config)", 0.08, _flags, _config),
)
