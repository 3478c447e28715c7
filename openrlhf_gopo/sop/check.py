"""The checker: what goes wrong in the dialogues that an SOP permits.

    for finding in check(sop, catalogue).findings: ...

kind            meaning
contradiction   two rules on one strategy exclude each other
unreachable     a strategy, or a mandatory step, that no dialogue can use
dead end        a dialogue in which nothing is free before the end: ``Sop.allowed`` falls back on the terminal ones
trap            a dialogue from which no terminal strategy can be reached any more, however long it goes on

What is assumed. Facts are only ever learned. The user, or the environment's systems, may tell any fact at any time, or
never. A strategy that asks for a fact makes it known; with ``answered=False`` a question may also stay unanswered.

Exactness. Every finding holds: dead ends and traps come with a dialogue that leads there. Where ``Report.complete`` is
True nothing was missed either. It is False when the search ran into ``limit`` states; then findings may be missing.
Dead ends and traps are reported one a run: the first found.

How it stays fast. Dialogues are not enumerated. A strategy is reachable if what it comes after can be used in some
order, so only these strategies are searched. A dead end needs a reason for every strategy at once; the reasons are
chosen first (``dead_ends.py``), most choices contradict each other, and only for the rest is a dialogue searched. Traps
need rules that close things for good on the way to the end; without them there is nothing to search.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.errors import Where
from openrlhf_gopo.sop.dead_ends import dead_end
from openrlhf_gopo.sop.rules import Rule, Sop
from openrlhf_gopo.sop.search import NONE, Budget, Need, State, Target, closure, find, needs
from openrlhf_gopo.types import Strategy

LIMIT = 100_000


@dataclass(frozen=True)
class Finding:
    """One thing wrong, with ``strategy`` ("" when it is not about one) or in a dialogue that the message spells out.

    ``where`` is the place of the rule or strategy in the SOP's file, ``also`` that of the rule it clashes with.
    """

    kind: str
    strategy: str
    message: str
    where: Where = ()
    also: Where = ()


@dataclass(frozen=True)
class Report:
    """``states``: how many were visited; ``complete``: False when the limit stopped a search."""

    findings: tuple[Finding, ...]
    states: int
    complete: bool


def check(sop: Sop, catalogue: Iterable[Strategy] = (), *, answered: bool = True, limit: int = LIMIT) -> Report:
    """Check one SOP: of an SOP with parts, each part is one.

    Args:
        catalogue: says which strategy asks for which facts; strategies that it lacks ask for none.
        answered: whether every question gets its answer at once.
        limit: states to visit at most, for all searches together.
    """
    asks = {strategy.id: strategy.asks for strategy in catalogue} if answered else {}
    of = needs(sop, asks)
    budget = Budget(limit)
    findings = list(_contradictions(sop))
    clashing = {finding.strategy for finding in findings}
    never = [s for s in sop.strategies if not _reachable(sop, of, s, budget)]
    findings += [f for f in _unreachable(sop, of, never) if f.strategy not in clashing]
    if sop.mandatory and not sop.terminal:
        message = f"{sop.name}: mandatory steps, but no terminal strategy that waits for them; list one in terminal"
        findings.append(Finding("unreachable", "", message, ("mandatory",)))
    stuck = dead_end(sop, of, budget)
    if stuck is not None:
        message = f"{sop.name}: {_dialogue(stuck)} no rule leaves a strategy; loosen one, or one of the terminal ones"
        findings.append(Finding("dead end", "", message, _blamed(sop, stuck)))
    if not set(sop.terminal) <= set(never):
        lost = _trap(sop, of, budget)
        if lost is not None:
            message = f"{sop.name}: {_dialogue(lost)} no terminal strategy can be reached any more"
            findings.append(Finding("trap", "", message, _blamed(sop, lost)))
    return Report(tuple(findings), budget.spent, not budget.exceeded)


def unoffered(sop: Sop) -> Iterator[Finding]:
    """Strategies that no part of ``sop`` offers."""
    offered = {strategy for part in sop.parts for strategy in sop.part(part.name).strategies}
    for strategy in sop.strategies if sop.parts else ():
        if strategy not in offered:
            message = f"{sop.name}: no part offers {strategy!r}; add it to a part or leave it out"
            yield Finding("unreachable", strategy, message, ("strategies", strategy))


# Contradictions -------------------------------------------------------------------------------------------------


def _contradictions(sop: Sop) -> Iterator[Finding]:
    """Pairs of rules; what one rule holds against itself was refused when the SOP was built."""
    for strategy in sop.strategies:
        rules = [rule for rule in sop.rules if rule.strategy == strategy]
        for one in rules:
            for other in rules:
                yield from _clash(sop, one, other)
            early = [step for step in one.not_after if step in sop.mandatory and strategy in sop.terminal]
            if early:
                message = (
                    f"{sop.name}: {strategy!r} may not follow {early[0]!r}, which is mandatory before it; drop one"
                )
                yield Finding("contradiction", strategy, message, one.at)


def _clash(sop: Sop, one: Rule, other: Rule) -> Iterator[Finding]:
    facts = [fact for fact in one.requires_facts if fact in other.without_facts]
    order = [name for name in one.after if name in other.not_after]
    if one.after_any and set(one.after_any) <= set(other.not_after):
        order += one.after_any
    for names, first, second in ((facts, "requires", "forbids"), (order, "wants", "may not follow")):
        if names:
            message = f"{sop.name}: one rule on {one.strategy!r} {first} {names[0]!r}, another {second} it; drop one"
            yield Finding("contradiction", one.strategy, message, other.at, one.at)


# Reachability ---------------------------------------------------------------------------------------------------


def _reachable(sop: Sop, of: Mapping[str, Need], strategy: str, budget: Budget) -> bool:
    moves = closure(of, [strategy]).difference([strategy], sop.terminal)
    found = find(of, Target(opens=[strategy]), _ordered(sop, moves), budget)
    return found is not None or budget.exceeded


def _unreachable(sop: Sop, of: Mapping[str, Need], never: Sequence[str]) -> Iterator[Finding]:
    for strategy in never:
        what = "the mandatory step " if strategy in sop.mandatory else ""
        lacking = [other for other in sop.strategies if other in of[strategy].before and other in never]
        reason = (
            f"it comes after {lacking[0]!r}, which cannot either" if lacking else "no order of steps meets its rules"
        )
        message = f"{sop.name}: {what}{strategy!r} can never be used: {reason}; loosen a rule or leave it out"
        yield Finding("unreachable", strategy, message, _place(sop, strategy))


def _place(sop: Sop, strategy: str) -> Where:
    return next((rule.at for rule in sop.rules if rule.strategy == strategy and rule.at), ("strategies", strategy))


# Traps ----------------------------------------------------------------------------------------------------------


def _trap(sop: Sop, of: Mapping[str, Need], budget: Budget) -> State | None:
    """The first state in which the end is lost, with as few facts as do it.

    A fact told can close strategies and never reopens one that could not be reached by telling it later. So the end is
    lost with some facts if and only if it is lost with all: it is enough to try every set of strategies used.
    """
    if not _safe(of).isdisjoint(sop.terminal):
        return None
    scope = _ordered(sop, closure(of, sop.terminal, forbidding=True).difference(sop.terminal))
    moves = _ordered(sop, closure(of, sop.terminal).difference(sop.terminal))
    closing = NONE.union(*(of[s].without for s in (*scope, *sop.terminal)))

    def lost(state: State, told: frozenset[str]) -> bool:
        state = State(state.history, state.facts | told)
        return find(of, Target(opens=sop.terminal), moves, budget, state) is None and not budget.exceeded

    seen = set()
    waiting = deque([State()])
    while waiting:
        state = waiting.popleft()
        used = frozenset(state.history)  # the facts known follow from it
        if used in seen:
            continue
        seen.add(used)
        if not budget.take():
            return None
        if lost(state, closing):
            told = closing
            for fact in sorted(closing):
                told = told - {fact} if lost(state, told - {fact}) else told
            return State(state.history, state.facts | told)
        waiting += [state.use(s, of[s]) for s in scope if s not in used and state.usable(s, of[s])]
    return None


def _safe(of: Mapping[str, Need]) -> set[str]:
    """Strategies that can be reached from everywhere: nothing ever closes them before their first use."""
    safe: set[str] = set()
    while new := {
        strategy
        for strategy, need in of.items()
        if strategy not in safe
        and not need.without
        and not need.not_after
        and need.after <= safe
        and all(group & safe for group in need.after_any)
    }:
        safe |= new
    return safe


# Words ----------------------------------------------------------------------------------------------------------


def _dialogue(state: State) -> str:
    facts = f" with {', '.join(sorted(state.facts))} known" if state.facts else ""
    return f"after {', '.join(state.history) or 'the opening'}{facts},"


def _blamed(sop: Sop, state: State) -> Where:
    """The rule that closes a terminal strategy there, else the first rule that closes something."""
    order = sorted(sop.rules, key=lambda rule: rule.strategy not in sop.terminal)
    return next((rule.at for rule in order if rule.broken(state.history, state.facts)), ("mandatory",))


def _ordered(sop: Sop, strategies: Iterable[str]) -> list[str]:
    chosen = set(strategies)
    return [strategy for strategy in sop.strategies if strategy in chosen]
