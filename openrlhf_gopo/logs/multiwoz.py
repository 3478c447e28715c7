"""MultiWOZ's human dialogues as logs, in the goals, strategies, briefings and engagement scale of ``multiwoz``.

Left out, as in that environment: dialogues without a goal, a user's word, or anything that the database can satisfy.

Ours, not MultiWOZ's: ``inform:D`` is completed by the first turn in domain D that presents something (offer, inform,
book) once the user has told all their wishes there, or whose row satisfies them anyway; ``request:D`` by the first
``inform`` after the user asked for attributes, or the turn by which all those of the goal were said of that row;
``book:D`` by the first ``book``, whatever was booked. Required without completing anything: a question for a wish not
yet told, the refusal of a first attempt that has to fail, a goodbye once all is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.multiwoz import Multiwoz
from openrlhf_gopo.envs.multiwoz_db import Row, chosen, named, query
from openrlhf_gopo.envs.multiwoz_dialogue import PRESENT, Beat, Case
from openrlhf_gopo.envs.multiwoz_sop import ASK, brief, shown
from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.logs import human
from openrlhf_gopo.logs.human import Step
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.types import Goal

REFUSALS = {"no_offer": "info", "no_book": "book"}  # strategy -> the attempt that it turns down


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record per goal of the environment; the folder is in upstream's layout, see ``envs/multiwoz_reader.py``.

    Raises:
        DataError: the folder or a record in it is malformed.
    """
    env = Multiwoz.load(str(folder))
    return human.records(env, env.census, folder, lambda goal: _Judge(goal, env.case(goal), env.database).steps())


class _Judge:
    """Goes through one dialogue; knows the slots ``told``, the subgoals ``left`` and, by domain, the row presented."""

    def __init__(self, goal: Goal, case: Case, database: Mapping[str, Sequence[Row]]) -> None:
        self._case, self._database = case, database
        self._told, self._left = set(case.told), set(goal.subgoals)
        self._failing = set(case.failing)
        self._rows: dict[str, Row] = {}
        self._said: dict[str, str] = {}  # by domain, the agent's words so far

    def steps(self) -> Iterator[Step]:
        """One step per turn of the agent."""
        beats = self._case.beats
        for index, beat in enumerate(beats):
            self._told |= beat.tells
            domain = self._case.domains[beat.domain]
            found = self._found(domain)
            self._said[domain] = f"{self._said.get(domain, '')} {beat.text}"
            if beat.strategy in PRESENT and (rows := named(found, beat.text)):
                self._rows[domain] = rows[0]
            required, briefing = self._required(beat, domain), self._brief(beat, domain, found)
            reached = self._reached(beat, domain)
            self._left.difference_update(reached)
            if beat.strategy in REFUSALS:
                self._give_up(REFUSALS[beat.strategy], domain)
            answered = index + 1 < len(beats) and bool(beats[index + 1].user)
            yield Step(beat.user, beat.strategy, beat.text, briefing, reached, required, answered)

    def _give_up(self, part: str, domain: str) -> None:
        """What the user wanted first they want no more: as in the environment, they tell what they want instead."""
        if f"{part}:{domain}" in self._failing:
            self._failing.remove(f"{part}:{domain}")
            self._told |= {f"{domain}.{slot}" for slot in self._case.wants[domain].instead(part)}

    def _known(self, domain: str) -> dict[str, str]:
        """The constraints told so far, as the user wants them now."""
        want = self._case.wants[domain]
        wishes = {**want.info, **(want.fail_info if f"info:{domain}" in self._failing else {})}
        return {slot: value for slot, value in wishes.items() if f"{domain}.{slot}" in self._told}

    def _found(self, domain: str) -> list[Row]:
        return [] if domain == "taxi" else query(self._database[domain], self._known(domain))

    def _brief(self, beat: Beat, domain: str, found: Sequence[Row]) -> str:
        """As the environment's, about the row that the human presented."""
        if not beat.strategy:
            return ""
        row = self._rows.get(domain) or chosen(found, *self._case.spoken[domain])
        return brief(beat.strategy, domain, self._known(domain), len(found), row, self._case.receipts[domain])

    def _reached(self, beat: Beat, domain: str) -> list[str]:
        reached = [f"inform:{domain}"] if beat.strategy in PRESENT and self._suits(domain) else []
        asked = beat.strategy == "inform" and f"{domain}.?" in self._told
        reached += [f"request:{domain}"] if asked or self._all_said(domain) else []
        return [*reached, f"book:{domain}"] if beat.strategy == "book" else reached

    def _suits(self, domain: str) -> bool:
        """Whether what is presented is what the goal wants: the user has told it all, or the row named satisfies it."""
        wishes = self._case.wants[domain].info
        if self._known(domain) == wishes:
            return True
        return domain in self._rows and bool(query([self._rows[domain]], wishes))

    def _all_said(self, domain: str) -> bool:
        """Whether the agent has said every attribute that the goal asks for and the row presented has."""
        row = self._rows.get(domain, {})
        values = [row[name] for name in self._case.wants[domain].reqt if shown(name, row.get(name))]
        return bool(values) and all(mentions(self._said[domain], value) for value in values)

    def _required(self, beat: Beat, domain: str) -> bool:
        if beat.strategy == BYE:
            return not self._left
        if beat.strategy in REFUSALS:
            return f"{REFUSALS[beat.strategy]}:{domain}" in self._failing
        want, slot = self._case.wants[domain], beat.strategy.removeprefix(ASK)
        wished = slot != beat.strategy and (slot in want.info or slot in want.book)
        return wished and f"{domain}.{slot}" not in self._told
