"""A dialogue as plain text: for logs, trackers and terminals."""

from __future__ import annotations

import math
from collections.abc import Iterator

from openrlhf_gopo.types import Trajectory


def as_text(trajectory: Trajectory) -> str:
    """The goal, each turn with its choice among the allowed strategies and what came of it, and how it ended.

    Line breaks inside texts become blanks and other control characters go: one line is one utterance.
    """
    return "\n".join(" ".join(line.splitlines()) for line in map(_printable, _lines(trajectory)))


def _lines(trajectory: Trajectory) -> Iterator[str]:
    goal = trajectory.goal
    yield f"goal {goal.id} ({goal.intent}): {goal.context}"
    for turn in trajectory.turns:
        yield f"customer: {turn.user}"
        chance = turn.probabilities.get(turn.strategy, math.exp(turn.expert_logprob))
        # A script or an endpoint tells no probability; a sampled choice among several never has log-probability 0.
        known = bool(turn.probabilities) or turn.expert_logprob != 0
        parts = ["forced" if turn.forced else f"{f'{chance:.2f} ' if known else ''}among {len(turn.allowed)}"]
        parts += [f"completed {', '.join(turn.completed)}"] if turn.completed else []
        parts += [f"engagement {turn.engagement:.2f}", *([] if turn.on_task else ["off task"]), *turn.events]
        yield f"  [{turn.strategy}: {'; '.join(parts)}]"
        yield f"agent: {turn.reply}"
    if trajectory.cause:
        yield f"error: {trajectory.cause}"
    rewards = (f"{name} {value:.3g}" for name, value in trajectory.rewards.items() if not math.isnan(value))
    yield f"end: {trajectory.stop.value}; {', '.join(rewards) or 'not scored'}"


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in line)
