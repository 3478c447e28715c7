"""What the converters of human dialogues share: an agent's turns, judged by their converter, become a record.

The goal is the environment's, so a human row pairs with a policy's row goal by goal. Engagement is on the environments'
scale for words of the user's own; it stays unknown where the user said nothing to a turn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.base import SPLITS, Environment, HumanTurn
from openrlhf_gopo.envs.replayed import BYE, ENGAGEMENT, OFF_TASK
from openrlhf_gopo.types import Goal, StopReason

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One turn of a human agent.

    ``strategy``: "" when unknown. ``reached``: subgoals that it completes unless an earlier turn did; names that are no
    subgoal of the goal do not count. ``required``: a step of the task even if it completes nothing. ``answered``: the
    user said something to it.
    """

    user: str
    strategy: str
    reply: str
    briefing: str
    reached: Iterable[str]
    required: bool
    answered: bool


def records(
    env: Environment, census: Mapping[str, int], folder: Path, steps: Callable[[Goal], Iterable[Step]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record per goal of ``env``; what ``census`` says was left out is logged."""
    for reason, count in census.items():
        if reason.startswith("left out") and count:
            logger.warning("%s: %d dialogues %s", env.name, count, reason)
    for split in SPLITS:
        for goal in env.goals(split):
            yield where(folder, goal), _record(env.name, goal, steps(goal))


def where(folder: Path, goal: Goal) -> str:
    """Where the human dialogue behind ``goal`` stands, for error messages."""
    return f"{folder}: dialogue {goal.data['dialogue']}"


def record(source: str, goal: Goal, turns: list[dict[str, Any]], stop: StopReason, success: bool) -> dict[str, Any]:
    """The record of a human dialogue about ``goal``; its rating is ``goal.data["human_success"]``, if that is there."""
    fields = ("id", "intent", "context", "subgoals", "facts")
    outcome: dict[str, Any] = {"stop": stop.value, "success": success}
    if goal.data.get("human_success") is not None:
        outcome["rating"] = float(goal.data["human_success"])
    return {
        "id": goal.id,
        "source": source,
        "language": "en",
        "goal": {name: getattr(goal, name) for name in fields},
        "turns": turns,
        "outcome": outcome,
    }


def _record(source: str, goal: Goal, steps: Iterable[Step]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    left = dict.fromkeys(goal.subgoals)
    stop = StopReason.USER_LEFT
    for step in steps:
        completed = [subgoal for subgoal in dict.fromkeys(step.reached) if subgoal in left]
        left = {subgoal: None for subgoal in left if subgoal not in completed}
        on_task = bool(completed) or step.required
        turn: dict[str, Any] = {
            "user": step.user,
            "strategy": step.strategy or None,
            "reply": step.reply,
            "briefing": step.briefing,
        }
        turn |= {"completed": completed, "on_task": on_task, "events": ["reply"] if step.answered else []}
        if step.answered or step.strategy == BYE:
            turn["engagement"] = (ENGAGEMENT if on_task else OFF_TASK)["own"]
        if step.strategy == BYE:
            stop = StopReason.CLOSED
        turns.append(turn)
    return record(source, goal, turns, stop if left else StopReason.COMPLETED, not left)


def merged(turns: Iterable[HumanTurn]) -> list[HumanTurn]:
    """Without the turns that repeat a strategy before the user said anything: an agent of ours says it all at once."""
    kept: list[HumanTurn] = []
    for turn in turns:
        if not (kept and turn.strategy == kept[-1].strategy and not turn.user):
            kept.append(turn)
    return kept


def patient(goal: Goal) -> Goal:
    """``goal`` of a user who never leaves: the human one did not either."""
    return replace(goal, persona={**goal.persona, "patience": math.inf})
