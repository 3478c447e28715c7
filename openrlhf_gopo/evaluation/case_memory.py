"""A memory of decisions in past training dialogues, after Memento (arXiv 2508.16153): learning without weight updates.

The paper keeps cases (situation, what was done, reward) and lets a fixed model act on those it retrieves: by
similarity, or by a learned Q(situation, case), fitted with cross-entropy to whether a case led to success. Ours, not
the paper's:

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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.evaluation.case_index import CaseIndex, Floats
from openrlhf_gopo.rewards.text import words
from openrlhf_gopo.types import StopReason, Trajectory, Turn

CAPACITY = 20_000
CANDIDATES = 4  # times as many cases as asked for are ranked by Q
LESSONS = 64  # cases that Q is fitted to for each decision of a new dialogue
RATE = 0.3  # AdaGrad's step
PARTS = 4
FEATURES = 2 + 2 * PARTS


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Situation(_Strict):
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


class Precedent(_Strict):
    """One case: ``strategy`` was chosen in ``situation``; its dialogue ended with return ``score`` in [0, 1]."""

    situation: Situation
    strategy: str
    score: Annotated[float, Field(ge=0, le=1)]
    success: bool


Record = TypeVar("Record", bound=_Strict)


class _Head(_Strict):
    """First line of a file: how much the memory holds, and what Q learnt."""

    capacity: Annotated[int, Field(ge=1)]
    weights: Annotated[tuple[float, ...], Field(min_length=FEATURES, max_length=FEATURES)]
    squares: Annotated[tuple[float, ...], Field(min_length=FEATURES, max_length=FEATURES)]


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
        self._weights = np.zeros(FEATURES)
        self._squares = np.zeros(FEATURES)
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
        goal = trajectory.goal
        if self.frozen:
            raise DataError(f"goal {goal.id}: the case memory is frozen, as in an evaluation; add dialogues before it")
        if goal.split != "train":
            raise DataError(
                f"goal {goal.id}: it is of the split {goal.split!r}; a case memory takes training goals only"
            )
        if trajectory.stop is StopReason.FAILED:
            return 0
        if "tse" not in trajectory.rewards:
            raise DataError(f"goal {goal.id}: its dialogue has no reward tse; score it first")
        score = min(1.0, trajectory.rewards["tse"] / 100.0)  # weights of subgoals sum to 1 up to rounding
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

    def recall(self, situation: Situation, k: int, allowed: Collection[str], *, by_q: bool = False) -> list[Recalled]:
        """At most ``k`` cases whose strategy is in ``allowed``, the most similar first, the newer of equal ones.

        ``by_q``: the best by Q of ``CANDIDATES * k`` similar ones instead.
        """
        with self._lock:
            cases, similarities, features = self._nearest(situation, CANDIDATES * k if by_q else k, allowed)
            values = _sigmoid(features @ self._weights)
        found = [Recalled(*one) for one in zip(cases, similarities.tolist(), values.tolist(), strict=True)]
        return sorted(found, key=lambda one: -one.q)[:k] if by_q else found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON lines, in one move: a reader finds the old file or the new one."""
        with self._lock:
            head = _Head(
                capacity=self.capacity, weights=tuple(self._weights.tolist()), squares=tuple(self._squares.tolist())
            )
            lines = [head.model_dump_json(), *(case.model_dump_json() for case in self._cases)]
        draft = Path(f"{os.fspath(path)}.tmp")
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CaseMemory:
        """Read what ``save`` wrote.

        Raises:
            DataError: no such file, or a line that breaks the layout; names ``file:line:field``.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such case memory; give a file that CaseMemory.save wrote")
        with path.open("rb") as file:
            head = _read(_Head, file.readline(), f"{path}:1")
            memory = cls(head.capacity)
            memory._weights, memory._squares = np.array(head.weights), np.array(head.squares)
            for number, line in enumerate(file, start=2):
                memory._keep(_read(Precedent, line, f"{path}:{number}"))
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
        if len(features):
            slope = features.T @ (_sigmoid(features @ self._weights) - new.score) / len(features)
            self._squares += slope**2
            self._weights -= RATE * slope / np.sqrt(self._squares + 1e-12)


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def _read(model: type[Record], line: bytes, where: str) -> Record:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ":".join([where, *filter(None, [".".join(map(str, first["loc"]))])])
        raise DataError(f"{place}: {first['msg']}, got {first['input']!r:.80}") from None


def one_line(text: str) -> str:
    """``text`` without line breaks and lone surrogates."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()
