"""A memory of decisions in past training dialogues, for a vote (``memento.CaseVote``): learning without weight updates.

It is ours: the idea of acting on retrieved cases is Memento's (arXiv 2508.16153), whose own method is ``case_bank``.

- A case is one decision of the expert. Its situation is of what the expert knew: the context, the customer's first and
  last words, the strategies so far. Its outcome is the dialogue's return r = TSE / 100, and whether it succeeded.
- Similarity is the mean over the parts of a situation of their TF-IDF cosines (``case_index``).
- Q = sigmoid(w . (1, r, s, s r)), s being the similarities by part. A dialogue that is added shows what following a
  case leads to: for each of its decisions, Q of the most similar cases that chose the same is fitted to its return.

Cases hold nothing that an agent could not see then, and come from training goals only.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.evaluation.case_index import CaseIndex, Floats
from openrlhf_gopo.evaluation.case_store import (
    CAPACITY,
    Logistic,
    Strict,
    one_line,
    outcome,
    read_cases,
    usable,
    write_cases,
)
from openrlhf_gopo.rewards.text import words
from openrlhf_gopo.types import Trajectory, Turn

CANDIDATES = 4  # times as many cases as asked for are ranked by Q
LESSONS = 64  # cases that Q is fitted to for each decision of a new dialogue
PARTS = 4
FEATURES = 2 + 2 * PARTS


class Situation(Strict):
    """What an expert knows when it decides."""

    context: str
    opening: str
    user: str
    strategies: tuple[str, ...]

    @classmethod
    def of(cls, context: str, past: Sequence[Turn], user: str) -> Situation:
        """The situation of a turn. White space becomes single blanks: whatever was said is one line of a prompt."""
        opening = past[0].user if past else user
        return cls(
            context=one_line(context),
            opening=one_line(opening),
            user=one_line(user),
            strategies=tuple(turn.strategy for turn in past),
        )

    def terms(self) -> list[list[str]]:
        """By part; the last strategy counts as one more."""
        last = [f"last {strategy}" for strategy in self.strategies[-1:]]
        return [words(self.context), words(self.opening), words(self.user), [*self.strategies, *last]]


class Precedent(Strict):
    """One case: ``strategy`` was chosen in ``situation``; its dialogue ended with return ``score`` in [0, 1]."""

    situation: Situation
    strategy: str
    score: Annotated[float, Field(ge=0, le=1)]
    success: bool


@dataclass(frozen=True)
class Recalled:
    """A case with its similarity in [0, 1] and Q in [0, 1], the return that following it promises."""

    case: Precedent
    similarity: float
    q: float


class CaseMemory:
    """At most ``capacity`` cases; beyond it the oldest go. Thread-safe. ``frozen``: nothing may be added any more.

    What it holds depends on the order of ``add`` alone.

    Raises:
        ConfigError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        if capacity < 1:
            raise ConfigError(f"case memory: a capacity of {capacity}; give 1 or more")
        self.capacity, self.frozen = capacity, False
        self._cases: deque[Precedent] = deque()
        self._index = CaseIndex(PARTS)
        self._q = Logistic(FEATURES)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._cases)

    @property
    def cases(self) -> tuple[Precedent, ...]:
        """All cases, the oldest first."""
        with self._lock:
            return tuple(self._cases)

    def add(self, trajectory: Trajectory) -> int:
        """Learn from a scored training dialogue, then keep its decisions; the number of them.

        A forced turn is no decision. A failed dialogue is no evidence: nothing is kept.

        Raises:
            DataError: the memory is frozen, or the goal is not one of training, or the dialogue has no ``tse``.
        """
        if not usable(trajectory, self.frozen):
            return 0
        goal, score = trajectory.goal, outcome(trajectory)
        new = [
            Precedent(
                situation=Situation.of(goal.context, trajectory.turns[:index], turn.user),
                strategy=turn.strategy,
                score=score,
                success=trajectory.success,
            )
            for index, turn in enumerate(trajectory.turns)
            if not turn.forced
        ]
        with self._lock:
            for case in new:
                self._learn(case)
            for case in new:
                self._keep(case)
        return len(new)

    def grow(self, played: Iterable[Trajectory]) -> None:
        """Add dialogues that a policy with this memory has played."""
        for trajectory in played:
            self.add(trajectory)

    def recall(self, situation: Situation, k: int, allowed: Collection[str], *, by_q: bool = False) -> list[Recalled]:
        """At most ``k`` cases whose strategy is in ``allowed``, the most similar first, the newer of equal ones.

        ``by_q``: the best by Q of ``CANDIDATES * k`` similar ones instead.
        """
        with self._lock:
            cases, similarities, features = self._nearest(situation, CANDIDATES * k if by_q else k, allowed)
            values = self._q(features)
        found = [Recalled(*one) for one in zip(cases, similarities.tolist(), values.tolist(), strict=True)]
        return sorted(found, key=lambda one: -one.q)[:k] if by_q else found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it; see ``write_cases``."""
        with self._lock:
            write_cases(path, self.capacity, self._q, self._cases)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CaseMemory:
        """Read what ``save`` wrote; see ``read_cases``."""
        memory = cls()
        memory.capacity, cases = read_cases(path, Precedent, memory._q)
        for case in cases:
            memory._keep(case)
        return memory

    def _keep(self, case: Precedent) -> None:
        self._cases.append(case)
        self._index.add(case.situation.terms())
        if len(self._cases) > self.capacity:
            self._cases.popleft()
            self._index.drop_oldest()

    def _nearest(
        self, situation: Situation, k: int, allowed: Collection[str]
    ) -> tuple[list[Precedent], Floats, Floats]:
        """The ``k`` most similar cases that are ``allowed``, their similarities, and Q's features of them."""
        usable = np.array([i for i, case in enumerate(self._cases) if case.strategy in allowed], dtype=np.int64)
        if not usable.size:
            return [], np.zeros(0), np.zeros((0, FEATURES))
        parts = self._index.similarities(situation.terms())[usable]
        means = parts.mean(axis=1)
        order = np.lexsort((-usable, -means))[:k]
        cases, parts = [self._cases[i] for i in usable[order]], parts[order]
        scores = np.array([[case.score] for case in cases])
        return cases, means[order], np.hstack([np.ones_like(scores), scores, parts, parts * scores])

    def _learn(self, new: Precedent) -> None:
        """One AdaGrad step on the mean cross-entropy between ``new``'s return and Q of the cases that it followed."""
        _, _, features = self._nearest(new.situation, LESSONS, (new.strategy,))
        self._q.learn(features, new.score)
