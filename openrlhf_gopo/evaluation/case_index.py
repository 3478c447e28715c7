"""Which stored situations are most like this one, by their words.

A situation has parts, each a set of terms. The similarity of two parts is the cosine of their TF-IDF vectors (a term
counts once; idf = log(1 + n / df)), 1 where both are empty. Which parts, and that they weigh the same, is ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SLACK = 10_000  # terms without a row that are no reason to number them anew


class CaseIndex:
    """Situations in the order they were added, each with ``parts`` sets of terms. Not thread-safe: its memory is."""

    def __init__(self, parts: int) -> None:
        self._parts = [_Part() for _ in range(parts)]

    def add(self, terms: Sequence[Iterable[str]]) -> None:
        """Append one situation: its terms by part."""
        for part, own in zip(self._parts, terms, strict=True):
            part.add(own)

    def drop_oldest(self) -> None:
        for part in self._parts:
            part.drop_oldest()

    def similarities(self, terms: Sequence[Iterable[str]]) -> Floats:
        """Similarity in [0, 1] to every stored situation by part: (situations, parts)."""
        return np.stack([part.cosines(own) for part, own in zip(self._parts, terms, strict=True)], axis=1)


class _Part:
    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._rows: deque[list[int]] = deque()
        self._stale = True

    def add(self, terms: Iterable[str]) -> None:
        self._rows.append([self._ids.setdefault(term, len(self._ids)) for term in dict.fromkeys(terms)])
        self._stale = True

    def drop_oldest(self) -> None:
        self._rows.popleft()
        self._stale = True

    def cosines(self, terms: Iterable[str]) -> Floats:
        if self._stale:
            self._count()
        asked = set(terms)
        known = [self._ids[term] for term in asked if term in self._ids]
        shared = np.zeros_like(self._weights)
        shared[known] = self._weights[known]
        dots = np.bincount(self._owners, shared[self._flat], minlength=len(self._rows))
        length = np.sqrt(shared.sum() + (len(asked) - len(known)) * self._unseen)
        with np.errstate(invalid="ignore"):
            cosines = np.nan_to_num(dots / (self._lengths * length))
        return cosines if asked else (self._lengths == 0).astype(np.float64)

    def _forget(self) -> None:
        """Number the terms anew once most of them stand in no row any more: those of dropped rows do not pile up."""
        if len(self._ids) > 2 * sum(map(len, self._rows)) + _SLACK:
            terms = list(self._ids)
            self._ids = {}
            self._rows = deque(
                [self._ids.setdefault(terms[term], len(self._ids)) for term in row] for row in self._rows
            )

    def _count(self) -> None:
        """Squared idf of every term, and the length of every row's vector."""
        self._forget()
        sizes = [len(row) for row in self._rows]
        self._flat = np.fromiter(chain.from_iterable(self._rows), dtype=np.int64, count=sum(sizes))
        self._owners = np.repeat(np.arange(len(sizes)), sizes)
        found = np.maximum(np.bincount(self._flat, minlength=len(self._ids)), 1)  # 0: all its rows were dropped
        self._weights = np.log1p(len(sizes) / found) ** 2
        self._unseen = np.log1p(len(sizes)) ** 2
        self._lengths = np.sqrt(np.bincount(self._owners, self._weights[self._flat], minlength=len(sizes)))
        self._stale = False
