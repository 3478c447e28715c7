"""A dialogue under an SOP with its bookkeeping done: history, known facts, allowed strategies, the checks of a turn.

What is left to write is the customer, ``react``, and what the agent's systems say. *Bring your own environment* in the
README has one in 40 lines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from openrlhf_gopo.envs.base import Dialogue
from openrlhf_gopo.errors import DialogueError, SopError
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.sop import Sop
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason


class GuidedDialogue(Dialogue):
    """``goal``, ``history`` (strategies used), ``known`` (facts; ``react`` adds to it) and ``allowed`` may be read.

    Args:
        sop: what it allows is asked after every turn, with ``history`` and ``known``.
        greeting: the customer's first words.
    """

    def __init__(self, goal: Goal, sop: Sop, greeting: str) -> None:
        self.goal, self.sop = goal, sop
        self.history: list[str] = []
        self.known: set[str] = set()
        self._done: set[str] = set()
        self._ended = False
        self.opening = self._observe(greeting)

    @abstractmethod
    def react(self, strategy: str) -> Outcome:
        """What an understood turn does: ``self.answer(...)`` or ``self.end(...)``. It is in ``history`` already."""

    def misunderstood(self, strategy: str) -> Outcome:
        """What a reply without the expected strings does: confusion, or the end after a terminal strategy."""
        return self.end(engagement=0.1) if strategy in self.sop.terminal else self.answer("Pardon?", engagement=0.1)

    def answer(
        self, words: str, *, completed: Iterable[str] = (), engagement: float = 0.5, events: Iterable[str] = ("reply",)
    ) -> Outcome:
        """The customer says ``words``; subgoals that were completed before are left out."""
        return self._outcome(completed, engagement, events, None, words)

    def end(
        self, *, completed: Iterable[str] = (), engagement: float = 0.5, events: Iterable[str] = ("leave",)
    ) -> Outcome:
        """The dialogue is over: completed if every subgoal is, else closed."""
        everything = self._done.union(completed) >= self.goal.subgoals.keys()
        stop = StopReason.COMPLETED if everything else StopReason.CLOSED
        return self._outcome(completed, engagement, events, stop, "")

    def step(self, strategy: str, reply: str) -> Outcome:
        if self._ended:
            raise DialogueError(f"goal {self.goal.id}: step({strategy!r}) after the dialogue ended")
        if strategy not in self.allowed:
            why = self.sop.why_not(strategy, self.history, self.known)
            raise SopError(f"goal {self.goal.id}: {strategy!r} is not allowed now: it {why}")
        understood = bool(reply.strip()) and all(mentions(reply, text) for text in self.expected(strategy))
        self.history.append(strategy)
        return self.react(strategy) if understood else self.misunderstood(strategy)

    def _outcome(
        self, completed: Iterable[str], engagement: float, events: Iterable[str], stop: StopReason | None, words: str
    ) -> Outcome:
        new = tuple(subgoal for subgoal in completed if subgoal not in self._done)
        self._done.update(new)
        self._ended = stop is not None
        following = None if self._ended else self._observe(words)
        return Outcome(tuple(events), new, engagement, bool(new), stop, following)

    def _observe(self, words: str) -> Observation:
        self.allowed = self.sop.allowed(self.history, self.known)
        return Observation(words, self.allowed)
