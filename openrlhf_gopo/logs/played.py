"""The human dialogues of an environment, played through it: what ``convert --played`` writes.

The strategies are the human agents', their queries included; users, rules and replies are the environment's (its
reference replies are the humans' own words where it has them). So each turn tells what the SOP allowed, and is one that
a rollout could have had. A turn whose strategy the data does not tell, or that the SOP forbids where the dialogue
stands, is not played: the next one follows on what the user said last. The customer's rating is that of the human
dialogue.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.base import SPLITS, Environment
from openrlhf_gopo.logs import human
from openrlhf_gopo.logs.human import merged, patient
from openrlhf_gopo.types import Goal, StopReason

logger = logging.getLogger(__name__)


def records(env: Environment, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record per goal of which a turn could be played; what could not be is counted in the log."""
    count: Counter[str] = Counter()
    for split in SPLITS:
        for goal in env.goals(split):
            turns, stop = _play(env, goal, count)
            done = {subgoal for turn in turns for subgoal in turn["completed"]}
            success = done == set(goal.subgoals)
            if success or stop is StopReason.COMPLETED:
                stop = StopReason.COMPLETED if success else StopReason.CLOSED
            if turns:
                yield human.where(folder, goal), human.record(env.name, goal, turns, stop, success)
            count["dialogues left out: no turn"] += not turns
    for reason, number in count.items():
        if number:
            logger.warning("%s: %d %s", env.name, number, reason)


def _play(env: Environment, goal: Goal, count: Counter[str]) -> tuple[list[dict[str, Any]], StopReason]:
    """The turns that could be played, and how the dialogue ended (``USER_LEFT``: with the human's last turn)."""
    dialogue = env.start(patient(goal), 0)
    seen, turns = dialogue.opening, list[dict[str, Any]]()
    agents = merged(env.human(goal))
    for index, turn in enumerate(agents):
        strategy = turn.strategy
        if strategy not in seen.allowed:
            count["turns not played: " + ("forbidden" if strategy else "strategy unknown")] += 1
            continue
        reply, briefing = dialogue.reference_reply(strategy), dialogue.briefing(strategy)
        outcome = dialogue.step(strategy, reply)
        turns.append(
            {
                "user": seen.user,
                "allowed": list(seen.allowed),
                "strategy": strategy,
                "reply": reply,
                "briefing": briefing,
                "events": list(outcome.events),
                "completed": list(outcome.completed),
                "engagement": outcome.engagement,
                "on_task": outcome.on_task,
            }
        )
        if outcome.next is None:
            count["turns not played: after the end"] += len(agents) - index - 1
            return turns, outcome.stop or StopReason.USER_LEFT
        seen = outcome.next
    return turns, StopReason.USER_LEFT
