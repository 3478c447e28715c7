"""What both case memories share: which dialogues they take, a learned value of a case, and their files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.case_index import Floats
from openrlhf_gopo.types import StopReason, Trajectory

CAPACITY = 20_000
RATE = 0.3  # AdaGrad's step


class Strict(BaseModel):
    """A record of a file: no unknown field, no conversion."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Record = TypeVar("Record", bound=Strict)


class Head(Strict):
    """First line of a file: how much the memory holds, and what Q learnt."""

    capacity: Annotated[int, Field(ge=1)]
    weights: tuple[float, ...]
    squares: tuple[float, ...]


class Logistic:
    """Q = sigmoid(w . x) in [0, 1], fitted by AdaGrad to outcomes in [0, 1]; w = 0 and Q = 0.5 at first."""

    def __init__(self, features: int) -> None:
        self.weights, self.squares = np.zeros(features), np.zeros(features)

    def __call__(self, features: Floats) -> Floats:
        """Q of each row of ``features``: (cases,) of (cases, features)."""
        return 1.0 / (1.0 + np.exp(-features @ self.weights))

    def learn(self, features: Floats, outcome: float) -> None:
        """One step on the mean cross-entropy between ``outcome`` and Q of the rows; none without rows."""
        if len(features):
            slope = features.T @ (self(features) - outcome) / len(features)
            self.squares += slope**2
            self.weights -= RATE * slope / np.sqrt(self.squares + 1e-12)


def usable(trajectory: Trajectory, frozen: bool) -> bool:
    """Whether a case memory takes a scored dialogue: one that failed is no evidence.

    Raises:
        DataError: the memory is ``frozen``, or the goal is not one of training, or the dialogue has no ``tse``.
    """
    goal = trajectory.goal
    if frozen:
        raise DataError(f"goal {goal.id}: the case memory is frozen, as in an evaluation; add dialogues before it")
    if goal.split != "train":
        raise DataError(f"goal {goal.id}: it is of the split {goal.split!r}; a case memory takes training goals only")
    if trajectory.stop is StopReason.FAILED:
        return False
    if "tse" not in trajectory.rewards:
        raise DataError(f"goal {goal.id}: its dialogue has no reward tse; score it first")
    return True


def outcome(trajectory: Trajectory) -> float:
    """TSE / 100, in [0, 1]: weights of subgoals sum to 1 up to rounding."""
    return min(1.0, trajectory.rewards["tse"] / 100.0)


def write_cases(path: str | os.PathLike[str], capacity: int, q: Logistic, cases: Iterable[Strict]) -> None:
    """Write a memory as JSON lines, in one move: a reader finds the old file or the new one."""
    head = Head(capacity=capacity, weights=tuple(q.weights.tolist()), squares=tuple(q.squares.tolist()))
    lines = [head.model_dump_json(), *(case.model_dump_json() for case in cases)]
    draft = Path(f"{os.fspath(path)}.tmp")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(path)


def read_cases(path: str | os.PathLike[str], kind: type[Record], q: Logistic) -> tuple[int, Iterator[Record]]:
    """What ``write_cases`` wrote: the capacity, and the cases as they are read; what Q learnt goes into ``q``.

    Raises:
        DataError: no such file, or a line that breaks the layout; names ``file:line:field``. Cases raise as they come.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such case memory; give a file that a case memory has saved")
    first, *lines = path.read_bytes().splitlines() or [b""]
    head = _read(Head, first, f"{path}:1")
    for name, found in (("weights", head.weights), ("squares", head.squares)):
        if len(found) != len(q.weights):
            raise DataError(f"{path}:1:{name}: {len(found)} numbers, not {len(q.weights)}; it is another memory's file")
    q.weights, q.squares = np.array(head.weights), np.array(head.squares)
    return head.capacity, (_read(kind, line, f"{path}:{number}") for number, line in enumerate(lines, start=2))


def _read(kind: type[Record], line: bytes, where: str) -> Record:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ":".join([where, *filter(None, [".".join(map(str, first["loc"]))])])
        raise DataError(f"{place}: {first['msg']}, got {first['input']!r:.80}") from None


def one_line(text: str) -> str:
    """``text`` without line breaks and lone surrogates."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()
