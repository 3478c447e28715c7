"""Standard operating procedures: which strategies are allowed now, from the strategies so far and the facts known.

An SOP is data: strategies, rules on them, terminal strategies, and parts (one per intent or desk). Every class
here is a plain dataclass whose fields are strings, numbers, booleans and tuples, so that a file form maps onto it 1:1.

    sop = Sop(("greet", "ask_id", "refund", "close"),
              rules=(Rule("refund", requires_facts=("order_id",), after=("greet",)), Rule("greet", max_uses=1)),
              terminal=("close",), mandatory=("refund",))
    sop.allowed(["greet"], {"order_id"})  # ('ask_id', 'refund')
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from openrlhf_gopo.errors import SopError, Where
from openrlhf_gopo.sop.consistency import names, problems, unknown


@dataclass(frozen=True)
class Rule:
    """Conditions under which ``strategy`` may be used. All of them hold, or it is not allowed.

    ``requires_facts``: facts that must be known; ``without_facts``: facts that must not be (do not ask what is known).
    ``after``: strategies that must all have been used; ``after_any``: at least one of them; ``not_after``: none of
    them. ``max_uses``: per dialogue. ``no_repeat``: not twice in a row. ``at``: the rule's place in its file.
    """

    strategy: str
    requires_facts: tuple[str, ...] = ()
    without_facts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    not_after: tuple[str, ...] = ()
    max_uses: int | None = None
    no_repeat: bool = False
    at: Where = field(default=(), compare=False, repr=False)

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
        found = list(problems(self))
        for part in () if found else self.parts:
            try:
                self.part(part.name)  # building it checks it
            except SopError as error:
                found += error.problems
        if found:
            raise SopError(found[0][1], found)

    def part(self, name: str) -> Sop:
        """The SOP of one intent: the general rules plus those of the part, over the part's strategies.

        Raises:
            SopError: no such part.
        """
        found = next((part for part in self.parts if part.name == name), None)
        if found is None:
            raise SopError(f"{self.name}: no part {name!r}; it has {names(part.name for part in self.parts)}")
        kept = [s for s in self.strategies if not found.strategies or s in found.strategies]
        rules = tuple(rule for rule in self.rules if rule.strategy in kept)
        try:
            return Sop(
                strategies=tuple(kept),
                rules=tuple(_within(rule, kept) for rule in rules) + found.rules,
                terminal=tuple(s for s in self.terminal if s in kept),
                mandatory=self.mandatory + tuple(s for s in found.mandatory if s not in self.mandatory),
                facts=self.facts,
                name=f"{self.name}, part {name!r}",
            )
        except SopError as error:
            here = ("parts", self.parts.index(found))
            moved = [(at if at[:1] in (("rules",), ("parts",)) else here, message) for at, message in error.problems]
            raise SopError(str(error), moved) from None

    def allowed(self, history: Sequence[str], facts: Collection[str]) -> tuple[str, ...]:
        """The strategies that may be used now, in catalogue order; never empty.

        Where every rule together forbids everything, the terminal strategies are allowed, mandatory steps or not: a
        dialogue can always be ended. An SOP without terminal strategies is checked to have one that no rule limits.

        Raises:
            SopError: ``history`` names an unknown strategy, or goes on after a terminal one.
        """
        return self.free(history, facts) or tuple(s for s in self.strategies if s in self.terminal)

    def free(self, history: Sequence[str], facts: Collection[str]) -> tuple[str, ...]:
        """The strategies that no rule forbids now, in catalogue order; () in a dead end (see ``check``).

        Raises:
            SopError: as ``allowed``.
        """
        self._check_history(history)
        return tuple(s for s in self.strategies if self._forbids(s, history, facts) is None)

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
        for strategy in history:
            if strategy not in self.strategies:
                raise SopError(f"{self.name}: {unknown(self, 'the history', strategy)}")
            if strategy in self.terminal:
                raise SopError(f"{self.name}: the terminal strategy {strategy!r} was used; the dialogue is over")


def _within(rule: Rule, kept: Collection[str]) -> Rule:
    """A general rule inside a part: ``after_any`` and ``not_after`` may name strategies the part does not offer."""
    return replace(
        rule,
        # With none of them on offer the rule can never be met: keep the names, so that the check reports it.
        after_any=tuple(s for s in rule.after_any if s in kept) or rule.after_any,
        not_after=tuple(s for s in rule.not_after if s in kept),
    )
