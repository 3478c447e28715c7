"""Standard operating procedures: which strategies are allowed now, from the strategies so far and the facts known.

An SOP is data: strategies, rules on them, terminal strategies, and parts (one per intent or desk). Every class
here is a plain dataclass whose fields are strings, numbers, booleans and tuples, so that a file form maps onto it 1:1.

    sop = Sop(("greet", "ask_id", "refund", "close"),
              rules=(Rule("refund", requires_facts=("order_id",), after=("greet",)), Rule("greet", max_uses=1)),
              terminal=("close",), mandatory=("refund",))
    sop.allowed(["greet"], {"order_id"})  # ('ask_id', 'refund')
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from openrlhf_gopo.errors import SopError


@dataclass(frozen=True)
class Rule:
    """Conditions under which ``strategy`` may be used. All of them hold, or it is not allowed.

    ``requires_facts``: facts that must be known; ``without_facts``: facts that must not be (do not ask what is known).
    ``after``: strategies that must all have been used; ``after_any``: at least one of them; ``not_after``: none of
    them. ``max_uses``: per dialogue. ``no_repeat``: not twice in a row.
    """

    strategy: str
    requires_facts: tuple[str, ...] = ()
    without_facts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    not_after: tuple[str, ...] = ()
    max_uses: int | None = None
    no_repeat: bool = False

    def broken(self, history: Sequence[str], facts: Collection[str]) -> str | None:
        """Why this rule forbids its strategy now; None when it does not."""
        missing = [fact for fact in self.requires_facts if fact not in facts]
        if missing:
            return f"needs the facts {', '.join(missing)}"
        known = [fact for fact in self.without_facts if fact in facts]
        if known:
            return f"is of no use once the facts {', '.join(known)} are known"
        missing = [other for other in self.after if other not in history]
        if missing:
            return f"comes after {', '.join(missing)}"
        if self.after_any and not any(other in history for other in self.after_any):
            return f"comes after one of {', '.join(self.after_any)}"
        early = [other for other in self.not_after if other in history]
        if early:
            return f"may not follow {', '.join(early)}"
        if self.max_uses is not None and history.count(self.strategy) >= self.max_uses:
            return f"was used {self.max_uses} time(s), its limit"
        if self.no_repeat and history and history[-1] == self.strategy:
            return "may not be used twice in a row"
        return None


@dataclass(frozen=True)
class Part:
    """What changes for one intent: the strategies offered (() = all), more rules, more mandatory strategies."""

    name: str
    strategies: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    mandatory: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sop:
    """Rules over a catalogue. Checked when built.

    ``strategies``: ids in catalogue order. Several rules for one strategy must all hold. ``terminal`` ones end the
    dialogue, and wait until every ``mandatory`` strategy was used. ``facts``: the fact names rules may use; () = any.

    Raises:
        SopError: a rule names an unknown strategy or fact, contradicts itself, or can never be met.
    """

    strategies: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    terminal: tuple[str, ...] = ()
    mandatory: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    facts: tuple[str, ...] = ()
    name: str = field(default="sop", compare=False)

    def __post_init__(self) -> None:
        _check(self)
        for part in self.parts:
            self.part(part.name)  # building it checks it

    def part(self, name: str) -> Sop:
        """The SOP of one intent: the general rules plus those of the part, over the part's strategies.

        Raises:
            SopError: no such part.
        """
        found = next((part for part in self.parts if part.name == name), None)
        if found is None:
            raise SopError(f"{self.name}: no part {name!r}; it has {_names(part.name for part in self.parts)}")
        _known(self, f"part {name!r}", found.strategies)
        kept = [s for s in self.strategies if not found.strategies or s in found.strategies]
        rules = tuple(rule for rule in self.rules if rule.strategy in kept)
        return Sop(
            strategies=tuple(kept),
            rules=tuple(_within(rule, kept) for rule in rules) + found.rules,
            terminal=tuple(s for s in self.terminal if s in kept),
            mandatory=self.mandatory + tuple(s for s in found.mandatory if s not in self.mandatory),
            facts=self.facts,
            name=f"{self.name}, part {name!r}",
        )

    def allowed(self, history: Sequence[str], facts: Collection[str]) -> tuple[str, ...]:
        """The strategies that may be used now, in catalogue order; never empty.

        Where every rule together forbids everything, the terminal strategies are allowed, mandatory steps or not: a
        dialogue can always be ended. An SOP without terminal strategies is checked to have one that no rule limits.

        Raises:
            SopError: ``history`` names an unknown strategy, or goes on after a terminal one.
        """
        self._check_history(history)
        free = tuple(s for s in self.strategies if self._forbids(s, history, facts) is None)
        return free or tuple(s for s in self.strategies if s in self.terminal)

    def why_not(self, strategy: str, history: Sequence[str], facts: Collection[str]) -> str | None:
        """Why ``strategy`` is not allowed now, for error messages; None when it is allowed."""
        if strategy not in self.strategies:
            return f"is not a strategy of {self.name}"
        return None if strategy in self.allowed(history, facts) else self._forbids(strategy, history, facts)

    def _forbids(self, strategy: str, history: Sequence[str], facts: Collection[str]) -> str | None:
        for rule in self._rules_of.get(strategy, ()):
            reason = rule.broken(history, facts)
            if reason is not None:
                return reason
        if strategy in self.terminal:
            missing = [step for step in self.mandatory if step not in history]
            if missing:
                return f"ends the dialogue before the mandatory {', '.join(missing)}"
        return None

    @cached_property
    def _rules_of(self) -> dict[str, list[Rule]]:
        grouped: dict[str, list[Rule]] = {}
        for rule in self.rules:
            grouped.setdefault(rule.strategy, []).append(rule)
        return grouped

    def _check_history(self, history: Sequence[str]) -> None:
        _known(self, "the history", history)
        ended = [s for s in history if s in self.terminal]
        if ended:
            raise SopError(f"{self.name}: the terminal strategy {ended[0]!r} was used; the dialogue is over")


def _within(rule: Rule, kept: Collection[str]) -> Rule:
    """A general rule inside a part: ``after_any`` and ``not_after`` may name strategies the part does not offer."""
    return Rule(
        rule.strategy,
        requires_facts=rule.requires_facts,
        without_facts=rule.without_facts,
        after=rule.after,
        # With none of them on offer the rule can never be met: keep the names, so that the check reports it.
        after_any=tuple(s for s in rule.after_any if s in kept) or rule.after_any,
        not_after=tuple(s for s in rule.not_after if s in kept),
        max_uses=rule.max_uses,
        no_repeat=rule.no_repeat,
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _known(sop: Sop, where: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in sop.strategies:
            raise SopError(f"{sop.name}: {where} names the unknown strategy {name!r}; known: {_names(sop.strategies)}")


def _check(sop: Sop) -> None:
    if not sop.strategies:
        raise SopError(f"{sop.name}: no strategies")
    for what, names in (("strategy", sop.strategies), ("part", [part.name for part in sop.parts])):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise SopError(f"{sop.name}: {what} {twice[0]!r} is listed twice")
    _known(sop, "terminal", sop.terminal)
    _known(sop, "mandatory", sop.mandatory)
    for rule in sop.rules:
        _check_rule(sop, rule)
    for step in sop.mandatory:
        if step in sop.terminal:
            raise SopError(f"{sop.name}: {step!r} is terminal and cannot be mandatory before the terminal strategies")
    _check_reachable(sop)
    if not sop.terminal and not _unlimited(sop):
        raise SopError(
            f"{sop.name}: every strategy is limited by rules and none is terminal: a dialogue could get stuck"
        )


def _check_rule(sop: Sop, rule: Rule) -> None:
    where = f"the rule on {rule.strategy!r}"
    _known(sop, "a rule", [rule.strategy])
    for what in ("after", "after_any", "not_after"):
        _known(sop, f"{where}, {what},", getattr(rule, what))
    for fact in (*rule.requires_facts, *rule.without_facts):
        if sop.facts and fact not in sop.facts:
            raise SopError(f"{sop.name}: {where} names the unknown fact {fact!r}; known: {_names(sop.facts)}")
    for first, second in (("after", "not_after"), ("requires_facts", "without_facts")):
        both = [name for name in getattr(rule, first) if name in getattr(rule, second)]
        if both:
            raise SopError(f"{sop.name}: {where} has {both[0]!r} in both {first} and {second}")
    if rule.max_uses is not None and rule.max_uses < 1:
        raise SopError(f"{sop.name}: {where} has max_uses={rule.max_uses}; leave the strategy out of the part instead")


def _check_reachable(sop: Sop) -> None:
    """Every strategy can be used in some dialogue in which all facts are known."""
    reached: set[str] = set()
    while True:
        new = {s for s in sop.strategies if s not in reached and _opens(sop, s, reached)}
        if not new:
            break
        reached |= new
    stuck = [s for s in sop.strategies if s not in reached]
    if stuck:
        raise SopError(f"{sop.name}: {stuck[0]!r} can never be allowed: what it must come after never is")


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
    limited = {r.strategy for r in sop.rules if r != Rule(r.strategy, no_repeat=r.no_repeat)}
    repeatable = {s for s in sop.strategies if s not in limited}
    no_repeat = {r.strategy for r in sop.rules if r.no_repeat}
    return len(repeatable) > 1 or bool(repeatable - no_repeat)
