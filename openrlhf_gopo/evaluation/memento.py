"""Experts that act on a case memory (``case_memory``): a vote without any language model, and advice for one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.evaluation.case_memory import CaseMemory, Recalled, Situation, one_line
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy
from openrlhf_gopo.rollout.agent import Agent, Case, Choice
from openrlhf_gopo.types import Turn

VOTERS = 16
POWERS = (4, 2)  # of a voter's similarity and return; chosen on training goals of the shop, neither is critical
SHOWN = 4  # cases in a prompt, as many as in the paper
WORDS = 100  # characters of each thing a customer said
HEADLINE = "What was chosen in similar situations, and how these dialogues ended (0 to 1):"


@dataclass(frozen=True)
class CaseVote:
    """The retrieved cases vote for what was chosen in them, by how their dialogues ended. Ours, not the paper's:

        V(z) = sum_{c that chose z} s_c^4 r_c^2

    s: similarity, r: return; with ``by_q`` the cases are the best by Q, and Q takes the place of r. The highest V wins,
    of equal ones the first in the catalogue; a strategy without a case has 0. It needs no model, and replies with the
    reference replies; ``Halves`` gives it another policy's responder.
    """

    memory: CaseMemory
    voters: int = VOTERS
    by_q: bool = False

    def open(self, case: Case) -> Agent:
        """The vote in one dialogue."""
        return Agent(_Voter(self, case), ScriptedPolicy(slip=0.0).open(case).responder)


@dataclass(frozen=True)
class _Voter:
    policy: CaseVote
    case: Case

    async def choose(self, past: Sequence[Turn], turn: Turn) -> Choice:
        if len(turn.allowed) == 1:
            return Choice(turn.allowed[0])
        situation = Situation.of(self.case.goal.context, past, turn.user)
        found = self.policy.memory.recall(situation, self.policy.voters, turn.allowed, by_q=self.policy.by_q)
        votes = tally(found, by_q=self.policy.by_q)
        order = [strategy.id for strategy in self.case.catalogue if strategy.id in turn.allowed]
        return Choice(max(order, key=lambda strategy: votes.get(strategy, 0.0)))


def tally(found: Sequence[Recalled], *, by_q: bool = False) -> Mapping[str, float]:
    """V of every strategy that a case of ``found`` chose; see ``CaseVote``."""
    votes: dict[str, float] = defaultdict(float)
    likeness, worth = POWERS
    for one in found:
        value = one.q if by_q else one.case.score
        votes[one.case.strategy] += one.similarity**likeness * value**worth
    return votes


@dataclass(frozen=True)
class CaseAdvice:
    """Retrieved cases as lines of a prompt: ``rollout.agent.Advice`` for sampled and for remote experts.

    At most ``shown`` cases and ``max_chars`` characters; of cases that do not fit, the best come first. What was said
    stands in quotes, on the case's own line, and cannot end either.
    """

    memory: CaseMemory
    shown: int = SHOWN
    max_chars: int = 1200
    by_q: bool = False

    def __call__(self, case: Case, past: Sequence[Turn], turn: Turn) -> str:
        """The lines for ``turn``; "" when nothing similar is known."""
        situation = Situation.of(case.goal.context, past, turn.user)
        found = self.memory.recall(situation, self.shown, turn.allowed, by_q=self.by_q)
        names = {strategy.id: one_line(strategy.name) for strategy in case.catalogue}
        text = ""
        for line in (_line(one, names) for one in found):
            longer = f"{text or HEADLINE}\n{line}"
            if len(longer) > self.max_chars:
                break
            text = longer
        return text


def _line(one: Recalled, names: Mapping[str, str]) -> str:
    """One case: what the customer said first and last, what had been done, what was chosen, how it ended."""
    then = one.case.situation
    said = " ... ".join(_quoted(text) for text in dict.fromkeys((then.opening, then.user)))
    done = ", ".join(names.get(strategy, "another strategy") for strategy in then.strategies) or "nothing"
    ended = "all done" if one.case.success else "not all done"
    return f"- {said}, after {done}: {names[one.case.strategy]} -> {one.case.score:.2f}, {ended}"


def _quoted(text: str) -> str:
    return json.dumps(text[:WORDS], ensure_ascii=False)
