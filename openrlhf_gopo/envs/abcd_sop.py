"""The procedure of one ABCD flow: its strategies, and when each is allowed.

Of 50 human dialogues 19 contain the action sequence that the guidelines require, so that sequence is no hard rule: it
shows in the subgoals and in relevance. Hard are three things that the data bears out. Membership: an action belongs to
the flow if its guidelines name it, or at least ``SHARE`` of the flow's training dialogues use it. Slots: an action of
``LOOKUPS`` needs the customer's values. Order: where every subflow that has B requires A before it, and so did
``BEFORE`` of the training dialogues that use B, B comes after A.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.envs.abcd_reader import Flow
from openrlhf_gopo.envs.abcd_reader import Manual as Book
from openrlhf_gopo.envs.abcd_turns import ASK, MORE, REPLY, asks
from openrlhf_gopo.envs.base import HumanDialogue
from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.sop.rules import Rule, Sop
from openrlhf_gopo.types import Strategy

SHARE, BEFORE = 0.02, 0.9
# Actions that look something up or note what the customer alone knows. Of the others, agents fill in much themselves
# ("give credit"), so theirs are no preconditions.
LOOKUPS = ("pull-up-account", "verify-identity", "validate-purchase", "membership", "shipping-status")
TALK = {
    REPLY: "Reply without an action: explain, clarify, answer a question.",
    MORE: "Ask whether there is anything else.",
    BYE: "Say goodbye and end the chat.",
}


@dataclass(frozen=True)
class Procedure:
    """What the agent may do in one flow."""

    flow: Flow
    strategies: tuple[Strategy, ...]
    sop: Sop

    def facts(self, missing: Mapping[str, Collection[str]]) -> set[str]:
        """The SOP's facts: the lookups for which no value is missing."""
        return {f"ready:{action}" for action in LOOKUPS if not missing.get(action)}


def write_procedure(flow: Flow, book: Book, dialogues: Sequence[HumanDialogue]) -> Procedure:
    """The procedure of ``flow``, from its guidelines and from what the agents of the training ``dialogues`` did."""
    used = Counter(action for one in dialogues for action in {t.strategy for t in one.turns} if action in book.slots)
    written = dict.fromkeys(action for actions in flow.required.values() for action in actions)
    seen = [action for action, count in sorted(used.items()) if count >= SHARE * len(dialogues)]
    actions = tuple(dict.fromkeys([*written, *flow.texts, *seen]))
    elsewhere = {action: text for other in book.flows.values() for action, text in other.texts.items()}
    strategies = [_action(action, {**elsewhere, **flow.texts}) for action in actions]
    strategies += [_question(action, book) for action in actions if asks(action, book)]
    strategies += [Strategy(id_, id_.replace("_", " "), text) for id_, text in TALK.items()]
    ids = tuple(strategy.id for strategy in strategies)
    rules = [Rule(id_, no_repeat=True) for id_ in ids if id_ not in (REPLY, BYE)]
    rules += [Rule(action, requires_facts=(f"ready:{action}",)) for action in LOOKUPS if action in actions]
    rules += [Rule(action, after=before) for action in written if (before := _before(action, flow, dialogues))]
    rules.append(Rule(BYE, after_any=tuple(id_ for id_ in ids if id_ != BYE)))
    return Procedure(flow, tuple(strategies), Sop(ids, tuple(rules), terminal=(BYE,), name=f"abcd, {flow.id}"))


def _action(action: str, texts: Mapping[str, str]) -> Strategy:
    text = re.sub(r"[\[\]]", "", " ".join(texts.get(action, "").replace("<or>", "or").split()))
    first, *rest = re.split(r"(?<=[.:])\s", re.sub(r"^\W*Option \w+\W*", "", text))
    if first.endswith(":") and first.startswith(("If ", "To ")) and rest:  # half a sentence
        first = f"{first} {rest[0]}"
    first = first.rstrip(":. ")
    return Strategy(action, action.replace("-", " "), f"Action. {first}." if first else "Action.", does=(action,))


def _question(action: str, book: Book) -> Strategy:
    slots = book.slots[action]
    words = ", ".join(slot_name(slot) for slot in slots)
    name = action.replace("-", " ")
    return Strategy(f"{ASK}{action}", f"ask for {name}", f"Ask for what {name} takes: {words}.", asks=slots)


def slot_name(slot: str) -> str:
    """``account_id`` -> account ID, ``reason_slotval`` -> reason."""
    spoken = {"customer_name": "name", "phone": "phone number", "shipping_option": "shipping status"}
    plain = spoken.get(slot, slot)
    return re.sub(r"\bid\b", "ID", plain.replace("_slotval", "").replace("_", " "))


def _before(action: str, flow: Flow, dialogues: Sequence[HumanDialogue]) -> tuple[str, ...]:
    """The actions that come before ``action`` by every guideline that has it, and in most of the dialogues."""
    rows = [list(row[: row.index(action)]) for row in flow.required.values() if action in row]
    depends = {other for optional in flow.optional.values() for other in optional}
    common = [other for other in rows[0] if other not in depends and all(other in row for row in rows)]
    orders = [[turn.strategy for turn in one.turns] for one in dialogues]
    orders = [order[: order.index(action)] for order in orders if action in order]
    enough = max(1.0, BEFORE * len(orders))
    return tuple(other for other in common if sum(other in order for order in orders) >= enough)
