"""Dead ends: is there a dialogue in which every strategy is forbidden at once?

In a dead end each strategy has a reason: a fact missing or known, a strategy used or not used, a limit reached, or
being the last one used. Instead of walking through the dialogues, one reason is chosen for every strategy, the one
with the fewest choices first. The choices soon contradict each other (this fact both known and unknown), which rules
out all dialogues of that kind at once. Where none do, a dialogue is searched in which all of them hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from openrlhf_gopo.sop.rules import Sop
from openrlhf_gopo.sop.search import NONE, Budget, Need, State, Target, closure, find


@dataclass(frozen=True)
class Guess:
    """What is to hold in the dead end. ``full``: strategies at their limit; ``last``: () or the last one used."""

    known: frozenset[str] = NONE
    unknown: frozenset[str] = NONE
    used: frozenset[str] = NONE
    unused: frozenset[str] = NONE
    full: frozenset[str] = NONE
    last: tuple[str, ...] = ()

    def includes(self, other: Guess) -> bool:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("known", "unknown", "used", "unused", "full"))
        return all(mine >= theirs for mine, theirs in pairs) and other.last in ((), self.last)

    def plus(self, other: Guess, of: Mapping[str, Need]) -> Guess | None:
        """Both, with what follows from them; None when that contradicts itself."""
        if self.last and other.last not in ((), self.last):
            return None
        last = self.last or other.last
        full = self.full | other.full
        used = self.used | other.used | full | set(last)
        while more := NONE.union(*(of[strategy].after for strategy in used)) - used:
            used |= more
        # Facts are only ever learned: what was required or asked when a strategy was used is known.
        known = (self.known | other.known).union(*(of[s].requires | of[s].asks for s in used))
        guess = Guess(known, self.unknown | other.unknown, used, self.unused | other.unused, full, last)
        clash = guess.known & guess.unknown or guess.used & guess.unused
        lacking = any(group <= guess.unused for strategy in used for group in of[strategy].after_any)
        return None if clash or lacking else guess


def dead_end(sop: Sop, of: Mapping[str, Need], budget: Budget) -> State | None:
    """A dialogue at whose end nothing is free; None when there is none, or when the budget ran out."""
    reasons = {strategy: list(_reasons(strategy, of[strategy])) for strategy in sop.strategies}
    waiting = [Guess(unused=frozenset(sop.terminal))]  # a terminal strategy ends the dialogue
    seen = set()
    while waiting:
        guess = waiting.pop()
        if guess in seen:
            continue
        seen.add(guess)
        if not budget.take():
            return None
        open_ones = [choices for choices in reasons.values() if not any(map(guess.includes, choices))]
        if open_ones:
            fitting = [[g for c in choices if (g := guess.plus(c, of))] for choices in open_ones]
            fewest = min(fitting, key=len)
            waiting += fewest
            continue
        state = _reach(sop, of, guess, budget)
        if state is not None:
            return state
    return None


def _reasons(strategy: str, need: Need) -> Iterator[Guess]:
    yield from (Guess(unknown=frozenset([fact])) for fact in sorted(need.requires))
    yield from (Guess(known=frozenset([fact])) for fact in sorted(need.without))
    yield from (Guess(unused=frozenset([other])) for other in sorted(need.after))
    yield from (Guess(unused=group) for group in need.after_any)
    yield from (Guess(used=frozenset([other])) for other in sorted(need.not_after))
    if need.max_uses is not None:
        yield Guess(full=frozenset([strategy]))
    if need.no_repeat:
        yield Guess(last=(strategy,))


def _reach(sop: Sop, of: Mapping[str, Need], guess: Guess, budget: Budget) -> State | None:
    uses = {s: (of[s].max_uses or 1) if s in guess.full else 1 for s in guess.used}
    # Nothing else helps: those at their limit and the last one are free until then, so they can take turns.
    helpful = closure(of, guess.used) - guess.unused
    moves = [strategy for strategy in sop.strategies if strategy in helpful]
    last = guess.last[0] if guess.last else None
    state = find(of, Target(uses, last), moves, budget, untold=guess.unknown)
    return state and State(state.history, state.facts | guess.known)
