"""Queries against MultiWOZ's database: which rows satisfy a user's constraints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from openrlhf_gopo.envs.reading import CLEAR, mentions

ANY = ("dontcare", "dont care", "do n't care", "none", "")  # values by which any will do
Row = Mapping[str, Any]
# Spellings of goals and dialogues for what the database has.
SAME = {
    "guest house": "guesthouse", "guest houses": "guesthouse", "hotels": "hotel", "center": "centre", "free": "yes",
    "concert hall": "concerthall", "swimming pool": "swimmingpool", "night club": "nightclub",
    "sports": "mutliple sports", "multiple sports": "mutliple sports",
}  # fmt: skip


def query(rows: Iterable[Row], constraints: Mapping[str, str]) -> list[Row]:
    """The rows that satisfy every constraint: at the earliest ``leaveAt``, at the latest ``arriveBy``, else equal.

    The best comes first: the earliest to leave, or the latest to arrive; else the database's order.
    """
    found = [row for row in rows if all(_fits(row, slot, value) for slot, value in constraints.items())]
    if "arriveBy" in constraints:
        return sorted(found, key=lambda row: _minutes(str(row.get("arriveBy", ""))) or 0, reverse=True)
    return sorted(found, key=lambda row: _minutes(str(row.get("leaveAt", ""))) or 0)


def _fits(row: Row, slot: str, value: str) -> bool:
    if slot not in row or value in ANY:
        return True
    if slot in ("leaveAt", "arriveBy"):
        at, limit = _minutes(str(row[slot])), _minutes(value)
        return at is not None and limit is not None and (at >= limit if slot == "leaveAt" else at <= limit)
    have, wanted = plain(str(row[slot])), [plain(part) for part in value.split("|")]
    if slot == "name":
        return any(part in have or have in part for part in wanted)
    return have in wanted


@lru_cache(maxsize=65536)
def plain(value: str) -> str:
    """A value without case, articles and punctuation, in the database's spelling."""
    text = " ".join(re.findall(r"[a-z0-9:]+", re.sub(r" ?'", "", value.casefold())))
    text = text.removeprefix("the ")
    return SAME.get(text, text)


@lru_cache(maxsize=65536)
def _minutes(time: str) -> int | None:
    found = re.fullmatch(r"(\d{1,2}):(\d{2})", time.strip())
    return int(found[1]) * 60 + int(found[2]) if found else None


def same(value: str, wanted: str) -> bool:
    """Whether an act's ``value`` is the ``wanted`` one; who does not care for parking needs none."""
    return plain(value) == plain(wanted) or (wanted == "no" and value in ANY)


def says(text: str, value: str) -> bool:
    """Whether ``text`` has ``value`` in any spelling, as words or the start of one (cheap in cheaper)."""
    wanted = plain(value)
    return len(wanted) > 2 and wanted not in CLEAR and (mentions(text, value) or f" {wanted}" in _respelt(text))


@lru_cache(maxsize=65536)
def _respelt(text: str) -> str:
    words = f" {plain(text)} "
    for old, new in SAME.items():
        words = words.replace(f" {old} ", f" {new} ")
    return words


def named(found: Sequence[Row], said: str) -> list[Row]:
    """Of the rows ``found``, those that a human named in ``said``."""
    words = f" {plain(said)} "
    return [row for row in found if any(f" {plain(str(row[k]))} " in words for k in ("name", "trainID") if k in row)]


def chosen(found: Sequence[Row], *said: str) -> Row | None:
    """Of the rows ``found``, the one that the first of the humans named in what they ``said``, else the first."""
    return next((row for words in said for row in named(found, words)), next(iter(found), None))
