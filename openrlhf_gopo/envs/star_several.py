"""Several STAR tasks in one dialogue: their manuals as one, and the dialogue in the names of that one.

A strategy that several tasks have under one label is one strategy, and the slots that it asks for are one slot ("May I
have your name?" is asked once for all). Only what is a task's own, its query, carries the task in its id
(``weather_query``), as does a slot whose name means something else in another task (``weather.Day``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.envs.star_reader import Event, Record, Task
from openrlhf_gopo.envs.star_sop import (
    CONFUSED,
    HELLO,
    MORE,
    SHARED,
    Manual,
    Result,
    canonical,
    describe,
    phase,
    write_sop,
)
from openrlhf_gopo.types import Strategy

REQUEST = "RequestType"  # tells a check from a booking; nothing that the user knows
Slots = Mapping[tuple[str, str], str]  # (task, slot) -> its name among several tasks


@dataclass(frozen=True)
class Several:
    """``manual`` is that of all ``manuals`` together; ``slots`` names their slots in it."""

    manuals: tuple[Manual, ...]
    slots: Slots
    manual: Manual

    def record(self, record: Record) -> Record:
        """``record`` with its labels, slots and queries named as in ``manual``."""
        return replace(record, events=tuple(self._event(event) for event in record.events))

    def values(self, task: str, values: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(slot, value) pairs of one task, the slots named as in ``manual``."""
        return [(self.slots.get((task, slot), slot), value) for slot, value in values]

    def _event(self, event: Event) -> Event:
        if event.kind == "wizard":
            found = [canonical(replace(event, text=""), m.task, m.task.id.partition("_")[0]) for m in self.manuals]
            known = [label for label in found if label in self.manual.templates]
            return replace(event, label=next(iter(known), ""))
        if event.kind == "query":
            task = next(manual.task for manual in self.manuals if manual.task.id == event.api)
            values = dict(self.values(task.id, event.values.items()))
            return replace(event, label=_phase(task, phase(event, task)), values=values)
        return event


def combine(manuals: Sequence[Manual]) -> Several:
    """The tasks of ``manuals`` as one task whose strategies are those of all of them, with their preconditions."""
    slots = _slots(manuals)
    strategies, queries = _strategies(manuals, slots), dict[str, str]()
    reports: dict[str, frozenset[Result]] = {}
    closers: dict[Result, tuple[str, ...]] = {}
    needed: dict[str, tuple[str, ...]] = {}
    for manual in manuals:
        task = manual.task
        queries |= {_phase(task, part): f"{task.id}_{query}" for part, query in manual.queries.items()}
        closers |= {(_phase(task, part), status): found for (part, status), found in manual.closers.items()}
        needed |= dict.fromkeys(
            (_phase(task, part) for part in manual.queries), tuple(slots.get((task.id, s), s) for s in task.required)
        )
        for label, after in manual.reports.items():
            after = frozenset((_phase(task, part), status) for part, status in after)
            reports[label] = reports.get(label, frozenset()) | after
    task = _task([manual.task for manual in manuals], slots)
    asks = {strategy.id: strategy.asks[0] for strategy in strategies if strategy.asks}
    templates = {label: text for manual in reversed(manuals) for label, text in manual.templates.items()}
    templates |= {f"{m.task.id}_{query}": m.templates[query] for m in manuals for query in m.queries.values()}
    templates[CONFUSED] = SHARED[CONFUSED]  # each task's own says that it can do nothing but that task
    return Several(
        manuals=tuple(manuals),
        slots=slots,
        manual=Manual(
            task=task,
            strategies=strategies,
            templates={strategy.id: templates[strategy.id] for strategy in strategies},
            asks=asks,
            reports=reports,
            closers=closers,
            queries=queries,
            slots={
                _phase(m.task, part): frozenset(slots[m.task.id, slot] for slot in wanted)
                for m in manuals
                for part, wanted in m.slots.items()
            },
            answers=frozenset(label for manual in manuals for label in manual.answers),
            sop=write_sop(f"star, {task.id}", strategies, reports, queries, needed),
        ),
    )


def _phase(task: Task, part: str) -> str:
    return f"{task.id}:{part}"


def _slots(manuals: Sequence[Manual]) -> dict[tuple[str, str], str]:
    """A slot that a shared question asks for is named as in the first task that has the question."""
    owner: dict[tuple[str, str], tuple[str, str]] = {}
    asked: dict[str, tuple[str, str]] = {}
    for manual in manuals:
        for slot in (slot for slot in manual.task.inputs if slot != REQUEST):
            labels = [label for label, wanted in manual.asks.items() if wanted == slot]
            one = next((asked[label] for label in labels if label in asked), (manual.task.id, slot))
            owner[manual.task.id, slot] = one
            asked |= {label: one for label in labels if label not in asked}
    named = sorted(set(owner.values()))
    clashing = {slot for _, slot in named if [name for _, name in named].count(slot) > 1}
    return {key: f"{task}.{slot}" if slot in clashing else slot for key, (task, slot) in owner.items()}


def _strategies(manuals: Sequence[Manual], slots: Slots) -> tuple[Strategy, ...]:
    """Hello, then task by task what it adds, then the other three shared ones."""
    found: dict[str, Strategy] = {}
    for manual in manuals:
        for strategy in manual.strategies:
            query = strategy.id in manual.queries.values()
            label = f"{manual.task.id}_{strategy.id}" if query else strategy.id
            asks = tuple(slots[manual.task.id, slot] for slot in strategy.asks)
            name = label.replace("_", " ")
            if label not in found or (asks and not found[label].asks):
                found[label] = replace(strategy, id=label, name=name, asks=asks, does=(label,) if query else ())
    found[CONFUSED] = replace(found[CONFUSED], description=describe(SHARED[CONFUSED]))
    inner = [strategy for label, strategy in found.items() if label not in SHARED]
    return (found[HELLO], *inner, found[MORE], found[CONFUSED], found[BYE])


def _task(tasks: Sequence[Task], slots: Slots) -> Task:
    """All of ``tasks`` as one; its graph is empty, as the manuals were written from theirs."""
    return Task(
        id="+".join(task.id for task in tasks),
        replies={label: text for task in reversed(tasks) for label, text in task.replies.items()},
        written=frozenset(label for task in tasks for label in task.written),
        graph={},
        inputs=tuple(dict.fromkeys(slots.get((task.id, s), s) for task in tasks for s in task.inputs)),
        required=tuple(dict.fromkeys(slots.get((task.id, s), s) for task in tasks for s in task.required)),
    )
