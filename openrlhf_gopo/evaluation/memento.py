"""Experts that act on past training dialogues: a vote without any language model, and Memento's advice for one."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.evaluation.case_bank import CaseBank, PastDialogue
from openrlhf_gopo.evaluation.case_memory import CaseMemory, Recalled, Situation
from openrlhf_gopo.evaluation.case_store import one_line
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy
from openrlhf_gopo.rollout.agent import Agent, Case, Choice
from openrlhf_gopo.types import Turn

VOTERS = 16
POWERS = (4, 2)  # of a voter's similarity and return; chosen on training goals of the shop, neither is critical
WORDS = 100  # characters of what a customer said
STEPS = 12  # strategies of a plan that are shown
POSITIVE = "Positive examples, in which everything was done:"
NEGATIVE = "Negative examples, in which something was left undone:"
ORDER = "Do as in the positive examples, and avoid what the negative ones did."


@dataclass(frozen=True)
class CaseVote:
    """The retrieved cases vote for what was chosen in them, by how their dialogues ended. Ours, not the paper's:

        V(z) = sum_{c that chose z} s_c^4 r_c^2

    s: similarity, r: return; with ``by_q`` the cases are the best by Q, and Q takes the place of r. Sampled at
    ``temperature`` tau, strategy z has probability V(z)^(1/tau) / sum_z' V(z')^(1/tau), and where none has a case all
    are alike. At 0 the highest V wins, of equal ones the first in the catalogue. A strategy without a case has V = 0.
    It needs no model, and replies with the reference replies; ``Halves`` gives it another policy's responder.
    """

    memory: CaseMemory
    voters: int = VOTERS
    by_q: bool = False
    temperature: float = 0.0

    def open(self, case: Case) -> Agent:
        """The vote in one dialogue; equal (goal, sample, dialogue seed) draw alike."""
        draws = random.Random(f"{case.goal.id}/{case.sample}/{case.seed}")
        return Agent(_Voter(self, case, draws), ScriptedPolicy(slip=0.0).open(case).responder)


@dataclass(frozen=True)
class _Voter:
    policy: CaseVote
    case: Case
    draws: random.Random

    async def choose(self, past: Sequence[Turn], turn: Turn) -> Choice:
        if len(turn.allowed) == 1:
            return Choice(turn.allowed[0])
        situation = Situation.of(self.case.goal.context, past, turn.user)
        found = self.policy.memory.recall(situation, self.policy.voters, turn.allowed, by_q=self.policy.by_q)
        votes = tally(found, by_q=self.policy.by_q)
        order = [strategy.id for strategy in self.case.catalogue if strategy.id in turn.allowed]
        if self.policy.temperature == 0:
            return Choice(max(order, key=lambda strategy: votes.get(strategy, 0.0)))
        chances = probabilities([votes.get(strategy, 0.0) for strategy in order], self.policy.temperature)
        (place,) = self.draws.choices(range(len(order)), chances)
        return Choice(order[place], math.log(chances[place]), dict(zip(order, chances, strict=True)))


def probabilities(votes: Sequence[float], temperature: float) -> list[float]:
    """The distribution that ``CaseVote`` samples from, in the order of ``votes``; ``temperature`` is above 0.

    >>> probabilities([3.0, 1.0], 1.0), probabilities([3.0, 1.0], 0.5), probabilities([0.0, 0.0], 1.0)
    ([0.75, 0.25], [0.9, 0.1], [0.5, 0.5])
    """
    most = max(votes)
    powers = [(vote / most) ** (1.0 / temperature) if most > 0 else 1.0 for vote in votes]
    return [power / sum(powers) for power in powers]


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
    """Memento's prompt, in our words: ``rollout.agent.Advice`` for sampled and for remote experts.

    What ``bank`` recalls for the dialogue, positive and negative examples apart. What was said stands in quotes, on the
    case's own line, and cannot end either.
    """

    bank: CaseBank

    def __call__(self, case: Case, past: Sequence[Turn], turn: Turn) -> str:
        """The lines for a dialogue, the same at every turn of it; "" when the bank is empty."""
        found = self.bank.recall(case.goal.context, (past[0] if past else turn).user)
        names = {strategy.id: one_line(strategy.name) for strategy in case.catalogue}
        lines: list[str] = []
        for headline, success in ((POSITIVE, True), (NEGATIVE, False)):
            if examples := [_line(one, names) for one in found if one.success is success]:
                lines += [headline, *examples]
        return "\n".join([*lines, ORDER] if lines else [])


def _line(one: PastDialogue, names: Mapping[str, str]) -> str:
    """One case: where it was, what the customer said first, and what was chosen."""
    plan = [names.get(strategy, "another strategy") for strategy in one.strategies[:STEPS]]
    more = ["..."] if len(one.strategies) > STEPS else []
    place = f" ({one.context[:WORDS]})" if one.context else ""
    return f"- {json.dumps(one.opening[:WORDS], ensure_ascii=False)}{place}: {', then '.join([*plan, *more])}"
