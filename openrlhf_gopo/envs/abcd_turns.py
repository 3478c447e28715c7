"""Human ABCD dialogues as turns: user's words, the agent's strategy, its words. A log converter can start from here.

ABCD labels what agents click, not what they say. Their clicks are strategies as they stand. Their words belong to the
click beside them, except four kinds, told apart by their wording: a question for what a coming click needs
(``ask:<action>``), ``anything_else``, ``goodbye``, and any other ``reply`` with no click in the same stretch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from openrlhf_gopo.envs.abcd_reader import Manual, Record
from openrlhf_gopo.envs.base import HumanDialogue, HumanTurn
from openrlhf_gopo.envs.replayed import BYE

ASK, MORE, REPLY = "ask:", "anything_else", "reply"
HELLO = re.compile(
    r"(?:how|what) (?:can|may|could) i (?:help|assist|be of|do for)|are you (?:still )?there|^(?:hi|hello|hey)\W*$",
    re.I,
)
ELSE = re.compile(
    r"(?:any|some) ?(?:thing|one)? ?(?:else|other (?:question|way)|more)|anymore help|any (?:other|more|further)"
    r"|(?:assist|help)\w* (?:you )?with anything",
    re.I,
)
FAREWELL = re.compile(
    r"\b(?:have|hav|enjoy) (?:a|an|your) .*\b(?:day|night|evening|one|weekend|rest|today)\b"
    r"|\bgood ?bye\b|\bbye\b|take care",
    re.I,
)
REQUEST = re.compile(
    r"\?|\b(?:(?:can|may|could|would|will) (?:i|you|we)|please|need|what(?:'s| is| was| are)?|which|give me|tell me)\b",
    re.I,
)
# How agents name a slot when they ask for it.
NAMED = {
    "customer_name": r"\bname", "account_id": r"account (?:id|number)", "order_id": r"order ?(?:id|number|#)",
    "zip_code": r"zip", "username": r"user ?name", "email": r"e-?mail", "phone": r"phone", "pin_number": r"\bpin\b",
    "security_answer": r"security|maiden", "product": r"item|product|brand", "amount": r"amount|cost|price|much",
    "membership_level": r"member(?:ship)? level|\b(?:gold|silver|bronze)", "full_address": r"address",
    "shipping_option": r"shipping status|status of|been delivered|shipped", "street_address": r"address",
    "payment_method": r"payment method|credit card|paypal", "change_option": r"change",
    "refund_target": r"refund(?:ed)? (?:to|processed)|like (?:the|your) refund",
    "reason_slotval": r"reason|why|how long|when did|where did", "order_slotval": r"by mail|in store|drop",
    "account_slotval": r"\b(?:add|remove|extend|renew)\b",
}  # fmt: skip


@dataclass
class _Draft:
    user: list[str]
    strategy: str
    texts: list[str]
    events: list[str] = field(default_factory=list)


def humans(manual: Manual, records: Iterable[Record]) -> Iterator[HumanDialogue]:
    """Every dialogue in which the customer says something, with its flow, subflow and the scenario's values."""
    for record in records:
        turns, last = _turns(record, manual)
        if turns and turns[0].user:
            goal = {"flow": record.flow, "subflow": record.subflow, "values": record.values}
            yield HumanDialogue(record.id, goal, tuple(turns), last)


def _turns(record: Record, manual: Manual) -> tuple[list[HumanTurn], str]:
    """The turns, and the customer's words after the last one. The agent's greeting comes before any turn: dropped."""
    required = manual.flows[record.flow].required[record.subflow]
    drafts: list[_Draft] = []
    user: list[str] = []
    waiting: list[str] = []  # the agent's words of this stretch that belong to what comes next
    fresh = False  # the last draft belongs to this stretch
    for index, event in enumerate(record.events):
        if event.speaker == "customer":
            if waiting:
                drafts.append(_Draft(user, REPLY, waiting))
                user, waiting = [], []
            user.append(event.text)
            fresh = False
            continue
        coming = [later.action for later in record.events[index:] if later.action]
        label = event.action or _label(event.text, (*coming, *required), manual)
        if not drafts and not waiting and not event.action and (not user or HELLO.search(event.text)):
            continue
        if label == REPLY and not fresh:
            waiting.append(event.text)
        elif fresh and not event.action and label in (REPLY, drafts[-1].strategy):
            drafts[-1].texts.append(event.text)
        else:
            said, done = ([], [event.text]) if event.action else ([event.text], [])
            drafts.append(_Draft(user, label, waiting + said, done))
            user, waiting, fresh = [], [], True
    if waiting:
        drafts.append(_Draft(user, REPLY, waiting))
        user = []
    _one_goodbye(drafts)
    turns = [HumanTurn(" ".join(d.user), d.strategy, " ".join(d.texts), tuple(d.events)) for d in drafts]
    return turns, " ".join(user)


def _label(text: str, coming: Sequence[str], manual: Manual) -> str:
    """What kind of words these are, for an agent who will, or should, click ``coming``."""
    if ELSE.search(text):
        return MORE
    if FAREWELL.search(text):
        return BYE
    if REQUEST.search(text):
        for action in dict.fromkeys(coming):
            slots = manual.slots[action] if asks(action, manual) else ()
            if any(slot in NAMED and re.search(NAMED[slot], text, re.I) for slot in slots):
                return f"{ASK}{action}"
    return REPLY


def asks(action: str, manual: Manual) -> bool:
    """Whether ``action`` takes something that the customer knows."""
    return any(slot in NAMED for slot in manual.slots[action])


def _one_goodbye(drafts: Sequence[_Draft]) -> None:
    """A dialogue ends once: earlier farewells become replies."""
    for draft in [d for d in drafts if d.strategy == BYE][:-1]:
        draft.strategy = REPLY
