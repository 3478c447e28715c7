"""Memento's case bank (arXiv 2508.16153), for dialogues: learning without weight updates.

After the paper: a case is a whole task (state, plan, reward), positive or negative by whether the task succeeded; a
planner, a language model that stays as it is, reads the best cases before it plans; every task that was played becomes
a case; Q(state, case) in [0, 1] is fitted with cross-entropy to whether a task succeeded for which the case was shown.
Ours, not the paper's:

- A task is a dialogue. Its state is what the expert knew at the start: the context and the customer's first words. Its
  plan is the strategies in their order.
- Similarity is the mean of the TF-IDF cosines of both parts (``case_index``), where the paper has a sentence encoder.
- Q = sigmoid(w . (1, y, s, s y)), s being the similarities by part and y = 1 for a positive case, where the paper has a
  neural network over both texts. It ranks ``CANDIDATES`` times as many similar cases as are shown.

Cases come from training goals only.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable

import numpy as np

from openrlhf_gopo.evaluation.case_index import CaseIndex, Floats
from openrlhf_gopo.evaluation.case_store import (
    CAPACITY,
    Logistic,
    Strict,
    one_line,
    read_cases,
    usable,
    write_cases,
)
from openrlhf_gopo.rewards.text import words
from openrlhf_gopo.types import Trajectory

SHOWN = 4  # cases that a planner reads, as many as in the paper
CANDIDATES = 4  # times as many similar cases are ranked by Q
PARTS = 2
FEATURES = 2 + 2 * PARTS


class PastDialogue(Strict):
    """One case: ``strategies`` were chosen, in this order, for a customer who began with ``opening``."""

    context: str
    opening: str
    strategies: tuple[str, ...]
    success: bool

    @classmethod
    def of(cls, trajectory: Trajectory) -> PastDialogue:
        """A dialogue that was played, with one turn or more."""
        return cls(
            context=one_line(trajectory.goal.context),
            opening=one_line(trajectory.turns[0].user),
            strategies=tuple(turn.strategy for turn in trajectory.turns),
            success=trajectory.success,
        )


class CaseBank:
    """At most ``capacity`` cases; beyond it the oldest go. Thread-safe. ``frozen``: nothing may be added any more.

    What it holds depends on the order of ``add`` and ``grow`` alone.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity, self.frozen = capacity, False
        self._cases: deque[PastDialogue] = deque()
        self._index = CaseIndex(PARTS)
        self._q = Logistic(FEATURES)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._cases)

    def add(self, trajectory: Trajectory) -> None:
        """Keep a scored training dialogue for which no case was shown; one that failed is no evidence.

        Raises:
            DataError: see ``usable``.
        """
        if usable(trajectory, self.frozen) and trajectory.turns:
            with self._lock:
                self._keep(PastDialogue.of(trajectory))

    def grow(self, played: Iterable[Trajectory]) -> None:
        """Learn from training dialogues in which the expert read what ``recall`` gave, with the bank as it is now.

        Q is fitted to how they ended, on the cases that were shown; then they become cases.

        Raises:
            DataError: see ``usable``.
        """
        new = [PastDialogue.of(t) for t in played if usable(t, self.frozen) and t.turns]
        with self._lock:
            # All are read before anything is learned: what was shown depends on the bank as it was.
            lessons = [(self._best(case.context, case.opening)[1], case.success) for case in new]
            for features, success in lessons:
                self._q.learn(features, float(success))
            for case in new:
                self._keep(case)

    def recall(self, context: str, opening: str) -> list[PastDialogue]:
        """At most ``SHOWN`` cases for a dialogue, the best by Q first; equal ones by similarity, then the newer."""
        with self._lock:
            return self._best(one_line(context), one_line(opening))[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it; see ``write_cases``."""
        with self._lock:
            write_cases(path, self.capacity, self._q, self._cases)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CaseBank:
        """Read what ``save`` wrote; see ``read_cases``."""
        bank = cls()
        bank.capacity, cases = read_cases(path, PastDialogue, bank._q)
        for case in cases:
            bank._keep(case)
        return bank

    def _keep(self, case: PastDialogue) -> None:
        self._cases.append(case)
        self._index.add(_terms(case.context, case.opening))
        if len(self._cases) > self.capacity:
            self._cases.popleft()
            self._index.drop_oldest()

    def _best(self, context: str, opening: str) -> tuple[list[PastDialogue], Floats]:
        """The cases to show, and Q's features of them: (cases, ``FEATURES``)."""
        if not self._cases:
            return [], np.zeros((0, FEATURES))
        parts = self._index.similarities(_terms(context, opening))
        means = parts.mean(axis=1)
        near = np.lexsort((-np.arange(len(means)), -means))[: CANDIDATES * SHOWN]
        success = np.array([[float(self._cases[i].success)] for i in near])
        features = np.hstack([np.ones_like(success), success, parts[near], parts[near] * success])
        order = np.argsort(-self._q(features), kind="stable")[:SHOWN]
        return [self._cases[i] for i in near[order]], features[order]


def _terms(context: str, opening: str) -> list[list[str]]:
    return [words(context), words(opening)]
