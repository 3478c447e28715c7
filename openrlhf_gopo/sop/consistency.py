"""What makes an SOP impossible on its face: unknown names, rules that contradict themselves, circular order.

``Sop`` refuses to be built with any of it. What only a search through the dialogues can show is in ``check.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from openrlhf_gopo.errors import Where

if TYPE_CHECKING:
    from openrlhf_gopo.sop.rules import Rule, Sop

Problem = tuple[Where, str]


def problems(sop: Sop) -> Iterator[Problem]:
    """Every reason to refuse ``sop`` (its parts apart): the place of the field, and a message that names the SOP."""
    found = [*_lists(sop), *_unknown_names(sop), *_contradictions(sop)]
    # With a wrong name the order of the rules means nothing.
    for where, message in found or _order(sop):
        yield where, f"{sop.name}: {message}"


def names(values: Iterable[str]) -> str:
    return ", ".join(values) or "none"


def unknown(sop: Sop, where: str, name: str) -> str:
    return f"{where} names the unknown strategy {name!r}; known: {names(sop.strategies)}"


def _lists(sop: Sop) -> Iterator[Problem]:
    if not sop.strategies:
        yield ("strategies",), "no strategies"
    for what, field, values in (
        ("strategy", "strategies", sop.strategies),
        ("part", "parts", [part.name for part in sop.parts]),
    ):
        for name, count in Counter(values).items():
            if count > 1:
                last = len(values) - 1 - list(reversed(values)).index(name)
                yield (field, last), f"{what} {name!r} is listed twice"
    for index, step in enumerate(sop.mandatory):
        if step in sop.terminal:
            message = f"{step!r} is terminal and cannot be mandatory before the terminal strategies"
            yield ("mandatory", index), message


def _unknown_names(sop: Sop) -> Iterator[Problem]:
    lists: list[tuple[Where, str, Collection[str]]] = [
        (("terminal",), "terminal", sop.terminal),
        (("mandatory",), "mandatory", sop.mandatory),
    ]
    for index, part in enumerate(sop.parts):
        lists.append((("parts", index, "strategies"), f"part {part.name!r}", part.strategies))
        lists.append((("parts", index, "mandatory"), f"part {part.name!r}, mandatory,", part.mandatory))
    for rule in sop.rules:
        if rule.strategy not in sop.strategies:
            yield (*rule.at, "strategy"), unknown(sop, "a rule", rule.strategy)
        for field in ("after", "after_any", "not_after"):
            lists.append(((*rule.at, field), f"the rule on {rule.strategy!r}, {field},", getattr(rule, field)))
        yield from _unknown_facts(sop, rule)
    for where, what, given in lists:
        for index, name in enumerate(given):
            if name not in sop.strategies:
                yield (*where, index), unknown(sop, what, name)


def _unknown_facts(sop: Sop, rule: Rule) -> Iterator[Problem]:
    for field in ("requires_facts", "without_facts"):
        for index, fact in enumerate(getattr(rule, field)):
            if sop.facts and fact not in sop.facts:
                message = f"the rule on {rule.strategy!r} names the unknown fact {fact!r}; known: {names(sop.facts)}"
                yield (*rule.at, field, index), message


def _contradictions(sop: Sop) -> Iterator[Problem]:
    for rule in sop.rules:
        where = f"the rule on {rule.strategy!r}"
        for first, second in (("after", "not_after"), ("requires_facts", "without_facts")):
            for name in getattr(rule, first):
                if name in getattr(rule, second):
                    yield (*rule.at, second), f"{where} has {name!r} in both {first} and {second}; drop one"
        if rule.max_uses is not None and rule.max_uses < 1:
            message = f"{where} has max_uses={rule.max_uses}; leave the strategy out of the part instead"
            yield (*rule.at, "max_uses"), message


def _order(sop: Sop) -> Iterator[Problem]:
    """Every strategy can be used in some dialogue in which all facts are known, and some strategy is always left."""
    reached: set[str] = set()
    while new := {s for s in sop.strategies if s not in reached and _opens(sop, s, reached)}:
        reached |= new
    for strategy in sop.strategies:
        if strategy not in reached:
            message = f"{strategy!r} can never be allowed: what it must come after never is"
            yield _place(sop, strategy), message
    if not sop.terminal and not _unlimited(sop):
        yield ("terminal",), "every strategy is limited by rules and none is terminal: a dialogue could get stuck"


def _place(sop: Sop, strategy: str) -> Where:
    ordered = (rule.at for rule in sop.rules if rule.strategy == strategy and (rule.after or rule.after_any))
    return next(ordered, ("strategies", strategy))


def _opens(sop: Sop, strategy: str, reached: Collection[str]) -> bool:
    # A terminal strategy ends the dialogue: nothing comes after it.
    before = {s for s in reached if s not in sop.terminal}
    rules = [rule for rule in sop.rules if rule.strategy == strategy]
    if strategy in sop.terminal and not before.issuperset(sop.mandatory):
        return False
    return all(
        before.issuperset(rule.after) and (not rule.after_any or not before.isdisjoint(rule.after_any))
        for rule in rules
    )


def _unlimited(sop: Sop) -> bool:
    limited = {r.strategy for r in sop.rules if replace(r, no_repeat=False) != type(r)(r.strategy)}
    repeatable = {s for s in sop.strategies if s not in limited}
    no_repeat = {r.strategy for r in sop.rules if r.no_repeat}
    return len(repeatable) > 1 or bool(repeatable - no_repeat)
