"""Search through the dialogues that an SOP permits, for the checker.

A state is what rules can observe: how often each strategy was used (up to its limit), the facts known, the last
strategy. Facts are only ever learned. Anyone may tell any fact at any time, so a search tells a fact at the last
moment, just before the first step that requires it: telling it earlier can only close steps in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from openrlhf_gopo.sop.rules import Sop

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Need:
    """All rules on one strategy as one. ``after_any``: of each group one; ``asks``: facts that using it makes known."""

    requires: frozenset[str]
    without: frozenset[str]
    after: frozenset[str]
    after_any: tuple[frozenset[str], ...]
    not_after: frozenset[str]
    max_uses: int | None
    no_repeat: bool
    asks: frozenset[str]

    @property
    def before(self) -> frozenset[str]:
        """The strategies whose use can help to open this one."""
        return self.after.union(*self.after_any)


def needs(sop: Sop, asks: Mapping[str, Collection[str]]) -> dict[str, Need]:
    """The needs of every strategy; a terminal one comes after the mandatory ones."""
    found = {}
    for strategy in sop.strategies:
        rules = [rule for rule in sop.rules if rule.strategy == strategy]
        mandatory = sop.mandatory if strategy in sop.terminal else ()
        found[strategy] = Need(
            requires=NONE.union(*(rule.requires_facts for rule in rules)),
            without=NONE.union(*(rule.without_facts for rule in rules)),
            after=frozenset(mandatory).union(*(rule.after for rule in rules)),
            after_any=tuple(frozenset(rule.after_any) for rule in rules if rule.after_any),
            not_after=NONE.union(*(rule.not_after for rule in rules)),
            max_uses=min((rule.max_uses for rule in rules if rule.max_uses is not None), default=None),
            no_repeat=any(rule.no_repeat for rule in rules),
            asks=frozenset(asks.get(strategy, ())),
        )
    return found


def closure(of: Mapping[str, Need], strategies: Iterable[str], *, forbidding: bool = False) -> set[str]:
    """``strategies``, what can help to open them, and so on; with ``forbidding`` also what closes any of these."""
    found: set[str] = set()
    waiting = list(strategies)
    while waiting:
        strategy = waiting.pop()
        if strategy not in found:
            found.add(strategy)
            waiting += of[strategy].before | (of[strategy].not_after if forbidding else NONE)
    return found


class Budget:
    """States left to visit. ``spent`` counts them; ``exceeded`` says that a search stopped early."""

    def __init__(self, limit: int) -> None:
        self.limit, self.spent, self.exceeded = limit, 0, False

    def take(self) -> bool:
        self.exceeded = self.exceeded or self.spent >= self.limit
        self.spent += not self.exceeded
        return not self.exceeded


@dataclass(frozen=True)
class State:
    history: tuple[str, ...] = ()
    facts: frozenset[str] = NONE

    def usable(self, strategy: str, need: Need, untold: Collection[str] = ()) -> bool:
        """Whether the rules permit ``strategy`` once the facts that it requires, none of them ``untold``, are told."""
        known = self.facts | need.requires
        return (
            need.requires.isdisjoint(untold)
            and need.without.isdisjoint(known)
            and need.after.issubset(self.history)
            and all(not group.isdisjoint(self.history) for group in need.after_any)
            and need.not_after.isdisjoint(self.history)
            and (need.max_uses is None or self.history.count(strategy) < need.max_uses)
            and not (need.no_repeat and self.history[-1:] == (strategy,))
        )

    def use(self, strategy: str, need: Need) -> State:
        return State((*self.history, strategy), self.facts | need.requires | need.asks)


@dataclass(frozen=True)
class Target:
    """A state to reach: every strategy of ``uses`` used that often at least, ``last`` used last, ``opens`` usable."""

    uses: Mapping[str, int] = field(default_factory=dict)
    last: str | None = None
    opens: Collection[str] = ()

    def met(self, state: State, of: Mapping[str, Need]) -> bool:
        return (
            all(state.history.count(strategy) >= count for strategy, count in self.uses.items())
            and self.last in (None, *state.history[-1:])
            and (not self.opens or any(state.usable(strategy, of[strategy]) for strategy in self.opens))
        )


def find(
    of: Mapping[str, Need],
    target: Target,
    moves: Collection[str],
    budget: Budget,
    start: State | None = None,
    untold: Collection[str] = (),
) -> State | None:
    """A state that meets ``target``, reached from ``start`` with ``moves`` alone and without learning ``untold``.

    None when there is none, or when the budget ran out. Depth first: without rules that close things, every step
    leads nearer. A strategy is used more than once only where the target counts uses or names the last one: what has
    been used stays used, and using it again opens nothing else.
    """
    repeats = target.last is not None or any(count > 1 for count in target.uses.values())
    moves = [move for move in moves if untold_by(of[move], untold)]
    seen = set()
    stack = [start or State()]
    while stack:
        state = stack.pop()
        if target.met(state, of):
            return state
        last = state.history[-1] if repeats and state.history else None
        counts = tuple(min(state.history.count(move), _cap(move, of, target, repeats)) for move in moves)
        key = (counts, last)  # the facts follow from what was used
        if key in seen:
            continue
        seen.add(key)
        if not budget.take():
            return None
        useful = [move for move in moves if repeats or move not in state.history]
        # The last one pushed is tried first: what the target still counts.
        useful.sort(key=lambda move: state.history.count(move) < target.uses.get(move, 0))
        stack += [state.use(move, of[move]) for move in useful if state.usable(move, of[move])]
    return None


def untold_by(need: Need, untold: Collection[str]) -> bool:
    """Whether using the strategy leaves the ``untold`` facts unknown."""
    return need.requires.isdisjoint(untold) and need.asks.isdisjoint(untold)


def _cap(move: str, of: Mapping[str, Need], target: Target, repeats: bool) -> int:
    limit = of[move].max_uses if repeats else None
    return max(limit or 1, target.uses.get(move, 0))
