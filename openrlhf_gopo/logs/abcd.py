"""ABCD's human dialogues as logs, in the goals, strategies, briefings and engagement scale of the environment ``abcd``.

Left out, as there: dialogues without a turn after the customer's first words. A click without words has the system's
line as its reply. A click that the environment's catalogue of the flow lacks has no strategy.

Ours, not ABCD's: ``slot:X`` is completed by the turn after which the customer told X, ``do:ACTION`` by the first click
of that action, and ``close:goodbye`` by a goodbye once every required action was clicked. Required without completing
anything, as there: a question for what a required action still misses, the answer to a question of the customer, the
first question for anything else once the actions are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.abcd import Abcd
from openrlhf_gopo.envs.abcd_dialogue import QUESTION, Case
from openrlhf_gopo.envs.abcd_turns import ASK, MORE, REPLY
from openrlhf_gopo.envs.base import HumanTurn
from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.logs import human
from openrlhf_gopo.logs.human import Step
from openrlhf_gopo.types import Strategy


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record per goal of the environment; the folder is the data folder of a clone of the ABCD repository.

    Raises:
        DataError: the folder or a record in it is malformed.
    """
    env = Abcd.load(str(folder))
    return human.records(env, env.census, folder, lambda goal: _steps(env.case(goal), env.catalogue(goal)))


def _steps(case: Case, catalogue: Sequence[Strategy]) -> Iterator[Step]:
    known = {strategy.id: strategy for strategy in catalogue}
    tells = {said.segment: said.tells for said in case.said}
    told, done, returned = set(case.told), set[str](), list[str]()
    for index, turn in enumerate(case.human.turns):
        chosen = known.get(turn.strategy)
        returned.append(case.returned(turn.strategy, turn.reply))
        required = _required(turn, case, told, done)
        done.add(turn.strategy)
        new = sorted(tells.get(index, ()))
        closes = turn.strategy == BYE and done.issuperset(case.required)
        yield Step(
            user=turn.user,
            strategy=chosen.id if chosen else "",
            reply=turn.reply or turn.events[0],
            briefing=case.brief(chosen, told, returned) if chosen else "",
            reached=[*(f"slot:{slot}" for slot in new), f"do:{turn.strategy}", *([f"close:{BYE}"] if closes else [])],
            required=required,
            answered=index in tells,
        )
        told.update(new)


def _required(turn: HumanTurn, case: Case, told: set[str], done: set[str]) -> bool:
    """Whether the task takes ``turn``, which completes no subgoal, after the strategies ``done``."""
    left = set(case.required) - done
    if turn.strategy == REPLY:
        return QUESTION.search(turn.user) is not None
    if turn.strategy == MORE:
        return not left and MORE not in done
    action = turn.strategy.removeprefix(ASK)
    return turn.strategy != action and action in left and bool(case.missing(action, told))
