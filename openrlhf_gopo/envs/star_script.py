"""Turns one human STAR dialogue into a script: what the user knows, when they told it, and what the tool returned.

A dialogue is cut into *rounds*: one query with its result and the reports the wizard made of it. ``segment`` counts
the results so far, so segment 0 lies before the first query. Only this module knows the human dialogue as a whole.
Over several tasks the rounds follow in the order of the dialogue, whichever task they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openrlhf_gopo.envs.reading import mentions
from openrlhf_gopo.envs.star_reader import Event, Record
from openrlhf_gopo.envs.star_sop import HELLO, Manual, Result, canonical, phase, status
from openrlhf_gopo.users.replay import Said

MAX_ROUNDS = 4
MAX_STEPS = 12  # required turns of one goal, two less than the environment's cap
MAX_REPORTS = 2  # per round
MESSAGES = ("Message", "ReservationStatus")  # the fields of an item that say how the query came out
SEVERAL = 2  # times as many rounds, steps and turns where the dialogue is over several tasks


@dataclass
class Beat:
    """One wizard turn and what the user said after it ("" when the dialogue ended)."""

    label: str
    text: str
    user: str
    segment: int


@dataclass(frozen=True)
class Round:
    """One query, what it needs (slot -> value, only slots a strategy asks for), its result, and its reports in order.

    ``extra``: slots that the user tells only when asked after the previous result. ``early``: indices in the script's
    ``said`` of the words that tell a value new in this round, where the user's last words before it do not.
    """

    result: Result
    item: Mapping[str, Any]
    needs: Mapping[str, str]
    reports: tuple[str, ...]
    extra: frozenset[str] = frozenset()
    early: tuple[int, ...] = ()


@dataclass(frozen=True)
class Script:
    """One goal's human dialogue, ready to replay. ``values`` are all (slot, value) pairs of its queries.

    ``cut``: later rounds were left out, so the user's words after the last kept result ask for more. ``wishes``: in a
    dialogue over several tasks, for every round the indices in ``said`` of the words that ask for it; else ().
    """

    record: Record
    opening: Said
    said: tuple[Said, ...]
    beats: tuple[Beat, ...]
    rounds: tuple[Round, ...]
    values: tuple[tuple[str, str], ...]
    cut: bool
    wishes: tuple[tuple[int, ...], ...] = ()

    def asked(self) -> tuple[str, ...]:
        """The slots the agent has to learn after the opening, in order of need."""
        slots: dict[str, None] = {}
        for index, current in enumerate(self.rounds):
            wanted = current.extra if index else set(current.needs) - self.opening.tells
            slots.update(dict.fromkeys(slot for slot in current.needs if slot in wanted))
        return tuple(slots)


@dataclass
class _Draft:
    """A dialogue while it is being cut: raw rounds as (query, result event), beats with their segment."""

    opening: str = ""
    beats: list[Beat] = field(default_factory=list)
    rounds: list[tuple[Event, Event]] = field(default_factory=list)


def write_script(record: Record, manual: Manual) -> Script | None:
    """The script of ``record``; None when no query of it has a result."""
    draft = _cut(record, manual)
    _merge_silent(draft, manual)
    if not draft.rounds or not draft.opening:
        return None
    rounds = _with_check(draft, [_round(draft, index, manual) for index in range(len(draft.rounds))])
    opening, said = _attribute(draft.opening, _said(draft, manual), rounds, manual)
    wishes: list[tuple[int, ...]] = []
    if len(record.tasks) > 1:
        wishes = [_wish(draft, index, current, manual) for index, current in enumerate(rounds)]
        opening = replace(opening, tells=opening.tells.union(*(said[i].tells for i in wishes[0])))
        rounds = [_with_unsaid(rounds, index, opening, said, wishes) for index in range(len(rounds))]
    else:
        rounds = [_with_extra(rounds, index, draft, opening, manual) for index in range(len(rounds))]
        rounds = [replace(current, early=_early(rounds, index, said)) for index, current in enumerate(rounds)]
    values = tuple({(s, v): None for query, _ in draft.rounds for s, v in query.values.items() if s != "RequestType"})
    script = Script(record, opening, tuple(said), tuple(draft.beats), tuple(rounds), values, False, tuple(wishes))
    return _shortened(script)


def _cut(record: Record, manual: Manual) -> _Draft:
    """Split the events into beats and rounds. A query that follows a result in silence replaces it."""
    draft, query = _Draft(), None
    domain = manual.task.id.partition("_")[0]
    for event in record.events:
        if event.kind == "query":
            query = event
        elif event.kind == "result" and query is not None:
            if draft.rounds and not any(beat.segment == len(draft.rounds) for beat in draft.beats):
                draft.rounds.pop()
            draft.rounds.append((query, event))
            query = None
        elif event.kind == "wizard":
            label = canonical(event, manual.task, domain)
            draft.beats.append(Beat(label, event.text, "", len(draft.rounds)))
        elif event.kind == "user" and draft.beats:
            draft.beats[-1].user = draft.beats[-1].user or event.text
        elif event.kind == "user":
            draft.opening = draft.opening or event.text
    return draft


def _merge_silent(draft: _Draft, manual: Manual) -> None:
    """Drop results that the wizard never reported: a later query, or the end, came first."""
    index = 0
    while index < len(draft.rounds):
        labels = [beat.label for beat in draft.beats if beat.segment == index + 1]
        reported = any(label in manual.reports or label == "" for label in labels)
        if reported or len(draft.rounds) == 1:
            index += 1
            continue
        del draft.rounds[index]
        for beat in draft.beats:
            beat.segment -= beat.segment > index


def _round(draft: _Draft, index: int, manual: Manual) -> Round:
    query, found = draft.rounds[index]
    result = (phase(query, manual.task), status(found.values))
    labels = [beat.label for beat in draft.beats if beat.segment == index + 1]
    told = [s for s in dict.fromkeys(labels) if result in manual.reports.get(s, ()) and says_something(s, manual)]
    slots = set(manual.asks.values())
    needs = {slot: value for slot, value in query.values.items() if slot in slots}
    earlier = [(phase(asked, manual.task), status(got.values), got.values) for asked, got in draft.rounds[:index]]
    item = after_check(found.values, result[0], query.values, earlier)
    return Round(result, item, needs, tuple(told[:MAX_REPORTS]))


def after_check(
    item: Mapping[str, Any], part: str, asked: Mapping[str, Any], earlier: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> Mapping[str, Any]:
    """A booking's ``item`` with what its check found and the tool does not say again: a ride's licence plate.

    ``part``: its phase; ``asked``: its query, which may want something else than the check did; ``earlier``: phase,
    status and item of the results before. The item of a check stays as it is.
    """
    if not part.endswith("book"):
        return item
    check = (part.removesuffix("book") + "check", "ok")
    found: Mapping[str, Any] = next((got for *result, got in reversed(earlier) if tuple(result) == check), {})
    wanted = {key.rpartition(".")[2]: value for key, value in asked.items()}
    return {**{key: wanted.get(key, value) for key, value in found.items() if key not in MESSAGES}, **item}


def says_something(label: str, manual: Manual) -> bool:
    """Whether a report tells something of the result: "search for more?" is no step of the task."""
    return "{" in manual.templates[label] or not re.match("[a-z]+_ask_", label)


def _with_check(draft: _Draft, rounds: list[Round]) -> list[Round]:
    """Put a successful check before a task's booking that the wizard made without one: the procedure asks for it."""
    parts = [current.result[0] for current in rounds]
    checks = [part.removesuffix("book") + "check" if part.endswith("book") else part for part in parts]
    index = next((i for i, check in enumerate(checks) if check not in parts[: i + 1]), None)
    if index is None:
        return rounds
    for beat in draft.beats:
        beat.segment += beat.segment > index
    item = {k: v for k, v in rounds[index].item.items() if k not in MESSAGES} or dict(rounds[index].needs)
    draft.rounds.insert(index, draft.rounds[index])
    added = replace(rounds[index], result=(checks[index], "ok"), item=item, reports=())
    return _with_check(draft, [*rounds[:index], added, *rounds[index:]])


def _said(draft: _Draft, manual: Manual) -> list[Said]:
    """The user's words after the opening. A question asks for more, and so do words that a further report answered."""
    said = []
    for index, beat in enumerate(draft.beats):
        rest = (later.label for later in draft.beats[index + 1 :] if later.segment == beat.segment)
        more = any(label in manual.reports and says_something(label, manual) for label in rest)
        if beat.user:
            said.append(Said(beat.user, beat.label, beat.segment, more=more or beat.user.rstrip().endswith("?")))
    return said


def _attribute(first: str, said: list[Said], rounds: Sequence[Round], manual: Manual) -> tuple[Said, list[Said]]:
    """Find the utterance that tells each slot: the first that mentions its value, else the answer to its question.

    A slot that is neither mentioned nor asked for was clear from the start (a default, or said in other words).
    """
    tells: list[set[str]] = [set() for _ in said]
    opening: set[str] = set()
    seen: set[str] = set()
    for index, current in enumerate(rounds):
        reach = [i for i, s in enumerate(said) if s.segment <= index]
        for slot, value in current.needs.items():
            if slot in seen:
                continue
            seen.add(slot)
            if mentions(first, value):
                opening.add(slot)
                continue
            where = [i for i in reach if mentions(said[i].text, value)]
            answers = [i for i in reach if manual.asks.get(said[i].after) == slot]
            if where or answers:
                tells[where[0] if where else answers[-1]].add(slot)
            else:
                opening.add(slot)
    told = [replace(s, tells=frozenset(slots)) for s, slots in zip(said, tells, strict=True)]
    return Said(first, "", 0, frozenset(opening)), told


def _with_extra(rounds: Sequence[Round], index: int, draft: _Draft, opening: Said, manual: Manual) -> Round:
    """Mark the slots that are new in this round and that the wizard asked for after the previous result."""
    earlier = {slot for current in rounds[:index] for slot in current.needs} | opening.tells
    asked = {manual.asks.get(beat.label) for beat in draft.beats if beat.segment == index}
    new = {slot for slot in rounds[index].needs if slot not in earlier and slot in asked} if index else set()
    return replace(rounds[index], extra=frozenset(new))


def _early(rounds: Sequence[Round], index: int, said: Sequence[Said]) -> tuple[int, ...]:
    """``Round.early``: "3 pm on Monday?" before the "5 pm" that answered a question about the end."""
    here = [i for i, s in enumerate(said) if index and s.segment == index]
    known = {value for current in rounds[:index] for value in current.needs.values()}
    new = {v for slot, v in rounds[index].needs.items() if v not in known and slot not in rounds[index].extra}
    untold = [value for value in new if not any(mentions(said[i].text, value) for i in here[-1:])]
    return tuple(i for i in here[:-1] if any(mentions(said[i].text, value) for value in untold))


def _wish(draft: _Draft, index: int, upcoming: Round, manual: Manual) -> tuple[int, ...]:
    """What the user said, since the result before, until the wizard asked for what the task of ``upcoming`` needs."""
    spoken, wish = 0, list[int]()
    for beat in draft.beats:
        if beat.segment == index and manual.asks.get(beat.label) in manual.slots[upcoming.result[0]]:
            break
        if beat.segment == index and beat.user:
            wish.append(spoken)
        spoken += bool(beat.user)
    return tuple(wish)


def _with_unsaid(
    rounds: Sequence[Round], index: int, opening: Said, said: Sequence[Said], wishes: Sequence[Sequence[int]]
) -> Round:
    """Mark the slots that are new in this round and not told by the words that ask for this round or an earlier one."""
    earlier = opening.tells.union(*(current.needs for current in rounds[:index]))
    earlier = earlier.union(*(said[i].tells for wish in wishes[: index + 1] for i in wish))
    return replace(rounds[index], extra=frozenset(rounds[index].needs) - earlier if index else frozenset())


def _shortened(script: Script) -> Script:
    """Keep the first rounds and reports that fit into ``MAX_ROUNDS`` and ``MAX_STEPS``."""
    times = SEVERAL if len(script.record.tasks) > 1 else 1
    kept = replace(script, rounds=script.rounds[: times * MAX_ROUNDS])
    while len(kept.rounds) > 1 and steps(kept) > times * MAX_STEPS:
        kept = replace(kept, rounds=kept.rounds[:-1])
    return replace(kept, cut=len(kept.rounds) < len(script.rounds))


def steps(script: Script) -> int:
    """The turns that the goal requires: questions, queries, reports, goodbye, and a hello where the human said it."""
    hello = bool(script.beats) and script.beats[0].label == HELLO
    return 1 + hello + len(script.asked()) + sum(1 + max(1, len(r.reports)) for r in script.rounds)


def report_ids(script: Script, index: int) -> list[str]:
    """The subgoals of one round: one per report, or a single one where any report of the result will do."""
    labels = script.rounds[index].reports
    return [f"report:{index + 1}:{label}" for label in labels] or [f"report:{index + 1}"]


def pairs(values: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The first value of each slot."""
    first: dict[str, str] = {}
    for slot, value in values:
        first.setdefault(slot, value)
    return first
