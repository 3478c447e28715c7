"""Human agents: their logged dialogues as a row of an evaluation, and how they fare under an environment's SOP.

A hard rule that people break often is no rule of the desk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from openrlhf_gopo.envs.base import Environment
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.logs import read, scored
from openrlhf_gopo.logs.convert import SOURCES, converted
from openrlhf_gopo.logs.human import merged, patient
from openrlhf_gopo.types import Goal, Trajectory


@dataclass
class SopShare:
    """Turns of human agents: ``turns`` judged, ``allowed`` of them when taken, the ``broken`` ones by strategy.

    Not judged, and not in ``turns``: ``unknown``, from the first turn on whose strategy the log does not say (what it
    did is unknown, so what was allowed next is too); ``late``, after the dialogue had ended.
    """

    turns: int = 0
    allowed: int = 0
    unknown: int = 0
    late: int = 0
    broken: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of ``turns`` that the SOP allowed, in [0, 1]; nan without turns."""
        return self.allowed / self.turns if self.turns else math.nan


def sop_share(env: Environment, goals: Iterable[Goal], seed: int = 0) -> SopShare:
    """Replay the strategies of each goal's human dialogue through ``env`` and count the turns that its SOP allowed.

    It is the strategies that are judged: the words are the reference replies.
    A forbidden turn is counted and not played, which may forbid later ones too; the user's patience is unlimited.
    """
    count = SopShare()
    for goal in goals:
        dialogue = env.start(patient(goal), seed)
        turns = merged(env.human(goal))
        known = next((index for index, turn in enumerate(turns) if not turn.strategy), len(turns))
        count.unknown += len(turns) - known
        allowed: tuple[str, ...] = dialogue.opening.allowed
        for index, turn in enumerate(turns[:known]):
            if not allowed:
                count.late += known - index
                break
            count.turns += 1
            if turn.strategy not in allowed:
                count.broken[turn.strategy] += 1
                continue
            count.allowed += 1
            outcome = dialogue.step(turn.strategy, dialogue.reference_reply(turn.strategy))
            allowed = outcome.next.allowed if outcome.next else ()
    return count


def logged(env: Environment, data: str | None, file: str | None, goals: Sequence[Goal]) -> list[Trajectory]:
    """Human dialogues as scored trajectories: those that ``goals`` were made from, or all of a log in ``file``.

    Raises:
        ConfigError: no ``file``, and the environment was not made from dialogues.
        DataError: the log is missing or malformed.
    """
    if file is not None:
        return [scored(dialogue) for _, dialogue in read(file)]
    if env.name not in SOURCES or data is None:
        raise ConfigError(
            f"--policy human: {env.name} was not made from human dialogues; give a log of them, as in human:FILE"
        )
    wanted = {goal.id for goal in goals}
    return [scored(dialogue) for dialogue in converted(env.name, data) if dialogue.goal.id in wanted]
