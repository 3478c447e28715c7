"""MultiWOZ's catalogue, procedure and briefings: the same for all goals.

The procedure's facts come from the database and from what was told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf_gopo.envs.multiwoz_db import Row
from openrlhf_gopo.envs.multiwoz_reader import table
from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.sop.rules import Rule, Sop
from openrlhf_gopo.types import Strategy

ASK, MORE, REPLY = "ask:", "anything_else", "reply"
SLOTS = {  # what there is to ask for, by domain
    "restaurant": ("area", "pricerange", "food", "name", "day", "people", "time"),
    "hotel": ("area", "pricerange", "type", "stars", "internet", "parking", "name", "day", "people", "stay"),
    "attraction": ("area", "type", "name", "pricerange"),
    "train": ("departure", "destination", "day", "leaveAt", "arriveBy", "people"),
    "taxi": ("departure", "destination", "leaveAt", "arriveBy"),
    "hospital": ("department",),
    "police": (),
}
BOOKED = {"restaurant": ("day", "people", "time"), "hotel": ("day", "people", "stay"), "train": ("people",), "taxi": ()}
NAMES = {slot: name for slot, name, _ in table()["slots"].values()}  # slot -> its name in a sentence
QUESTIONS = {slot: question for slot, _, question in table()["slots"].values()}
LABELS = {**NAMES, "trainID": "train ID", "phone": "phone number"}  # the same, with fields of the database
HIDDEN = ("location", "id", "introduction", "openhours", "signature", "takesbookings")  # fields nobody asks for


def strategies() -> tuple[Strategy, ...]:
    """The catalogue: a question for each slot, then the rest of the act table's strategies."""
    found: list[Strategy] = []
    for id_, text in table()["strategies"].items():
        if id_ == "ask":
            found += [Strategy(ASK + s, f"ask {n}", text.format(name=n), asks=(s,)) for s, n in NAMES.items()]
        else:
            does = (id_,) if id_ == "book" else ()
            found.append(Strategy(id_, id_.replace("_", " "), text, does=does))
    return tuple(found)


def procedure() -> Sop:
    """When each strategy is allowed.

    A question: in a domain that has the slot. What is presented, or said not to exist: as the database says for what
    was told so far. A booking: once all that it takes was told, as the booking office says.
    """
    ids = tuple(strategy.id for strategy in strategies())
    facts = {
        **{id_: f"slot:{id_.removeprefix(ASK)}" for id_ in ids if id_.startswith(ASK)},
        **{"offer": "found", "no_offer": "nothing", "inform": "found", "offer_book": "found"},
        **{"book": "bookable", "no_book": "unbookable"},
    }
    rules = [Rule(id_, requires_facts=(fact,)) for id_, fact in facts.items()]
    rules += [Rule(id_, no_repeat=True) for id_ in ids if id_.startswith(ASK) or id_ == MORE]
    rules.append(Rule(BYE, after_any=tuple(id_ for id_ in ids if id_ != BYE)))
    return Sop(ids, tuple(rules), terminal=(BYE,), name="multiwoz")


def brief(
    strategy: str, domain: str, told: Mapping[str, str], found: int, row: Row | None, booking: Mapping[str, str]
) -> str:
    """What ``strategy`` is for; that the database has ``found`` rows for what was ``told``, and ``row``, the one to
    present; what a ``booking`` returns."""
    kind, _, slot = strategy.partition(":")
    lines = [table()["strategies"][kind].format(name=LABELS.get(slot, slot))]
    if domain != "taxi" and kind in ("offer", "no_offer", "inform"):
        wishes = ", ".join(f"{LABELS.get(s, s)} {value}" for s, value in told.items())
        lines.append(f"Database: {found} of {domain} for {wishes or 'any wish'}.")
    if row and kind in ("offer", "inform"):
        lines.append("; ".join(f"{LABELS.get(k, k)}: {v}" for k, v in row.items() if shown(k, v)))
    if kind == "book":
        lines += [f"{name}: {value}" for name, value in booking.items()]
    return "\n".join(lines)


def shown(name: str, value: Any) -> bool:
    """Whether a field of a row is there to be told."""
    return name not in HIDDEN and isinstance(value, str) and value not in ("", "?")
