"""The shop's ten tasks: for each, the steps that a full service takes and what each step is worth.

A *mark* is something achieved: a fact told (``order_id``), or a result delivered (``refunded``). A mark with a weight
is a subgoal. Some steps are there in special cases only, named after the entry of ``Goal.data`` that tells them:
``wish`` (the customer wants one colour) and ``too_old`` (the order is older than the returns policy allows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WRAPPED = "wrapped_up"

# The desk puts these on hold, for every task, until the customer's identity is verified.
NEEDS_IDENTITY = frozenset({"give_refund", "send_replacement", "change_address", "check_payment"})


@dataclass(frozen=True)
class Step:
    """``strategy`` achieves ``mark``, worth ``weight`` (0: only a means), once the marks in ``needs`` are there.

    ``only``, ``unless``: the special case in which the step is there, or is not; "" for none.
    """

    strategy: str
    mark: str
    weight: float = 0.0
    needs: tuple[str, ...] = ()
    only: str = ""
    unless: str = ""


@dataclass(frozen=True)
class Task:
    """What one kind of customer wants.

    ``upset``: the shop is at fault, so an apology is due. ``told``: facts, none of them a subgoal, that a talkative
    customer gives at once.
    """

    desk: str
    steps: tuple[Step, ...]
    upset: bool = False
    told: tuple[str, ...] = ()

    def steps_for(self, data: Mapping[str, object]) -> tuple[Step, ...]:
        """The steps for a customer with this ``Goal.data``; at most one a strategy."""
        return tuple(
            step
            for step in self.steps
            if (not step.only or data[step.only]) and not (step.unless and data[step.unless])
        )


_NEED = Step("clarify", "need")
_CLOSE = Step("close", WRAPPED, 0.1)
_ORDER_ID = Step("ask_order_id", "order_id")


def _find_order(weight: float) -> Step:
    return Step("look_up_order", "order_found", weight, needs=("order_id",))


TASKS: Mapping[str, Task] = {
    "advice": Task(
        "presale",
        (
            _NEED,
            Step("ask_use", "use", 0.15),
            Step("ask_budget", "budget", 0.15),
            Step("recommend", "item_found", 0.25, needs=("use", "budget")),
            Step("check_stock", "stock_known", needs=("item_found",), only="wish"),
            Step("invite_to_buy", "bought", 0.35, needs=("item_found",)),
            _CLOSE,
        ),
    ),
    "choice": Task(
        "presale",
        (
            _NEED,
            Step("ask_use", "use"),
            Step("compare", "compared", 0.3, needs=("use",)),
            Step("check_stock", "stock_known", 0.25),
            Step("invite_to_buy", "bought", 0.35, needs=("compared", "stock_known")),
            _CLOSE,
        ),
        told=("use",),
    ),
    "warranty": Task(
        "presale",
        (
            _NEED,
            Step("explain_warranty", "warranty_known", 0.3),
            Step("check_stock", "stock_known", 0.25),
            Step("invite_to_buy", "bought", 0.35, needs=("warranty_known", "stock_known")),
            _CLOSE,
        ),
    ),
    "late": Task(
        "orders",
        (
            _NEED,
            _ORDER_ID,
            _find_order(0.25),
            Step("trace_parcel", "traced", 0.35, needs=("order_found",)),
            Step("offer_coupon", "made_good", 0.3, needs=("traced",)),
            _CLOSE,
        ),
        upset=True,
        told=("order_id",),
    ),
    "refund": Task(
        "orders",
        (
            _NEED,
            Step("verify_identity", "identity", 0.1),
            _ORDER_ID,
            _find_order(0.2),
            Step("explain_policy", "terms_known", 0.25),
            Step("give_refund", "refunded", 0.35, needs=("order_found", "terms_known"), unless="too_old"),
            Step("offer_coupon", "consoled", 0.35, needs=("order_found", "terms_known"), only="too_old"),
            _CLOSE,
        ),
        told=("order_id",),
    ),
    "damaged": Task(
        "orders",
        (
            _NEED,
            Step("apologise", "cared_for", 0.15),
            Step("verify_identity", "identity"),
            _ORDER_ID,
            _find_order(0.2),
            Step("ask_photo", "photo", 0.2),
            Step("send_replacement", "replaced", 0.35, needs=("order_found", "photo")),
            _CLOSE,
        ),
        upset=True,
        told=("order_id",),
    ),
    "address": Task(
        "orders",
        (
            _NEED,
            Step("verify_identity", "identity", 0.1),
            _ORDER_ID,
            _find_order(0.2),
            Step("ask_address", "address", 0.25),
            Step("change_address", "address_changed", 0.35, needs=("order_found", "address")),
            _CLOSE,
        ),
        told=("order_id",),
    ),
    "declined": Task(
        "payment",
        (
            _NEED,
            _ORDER_ID,
            Step("verify_identity", "identity"),
            Step("check_payment", "payment_checked", 0.3, needs=("order_id",)),
            Step("suggest_payment", "other_way", 0.25, needs=("payment_checked",)),
            Step("invite_to_buy", "bought", 0.35, needs=("other_way",)),
            _CLOSE,
        ),
        told=("order_id",),
    ),
    "coupon": Task(
        "payment",
        (
            _NEED,
            Step("ask_coupon", "coupon", 0.15),
            Step("check_coupon", "coupon_checked", 0.25, needs=("coupon",)),
            Step("offer_coupon", "new_coupon", 0.2, needs=("coupon_checked",)),
            Step("invite_to_buy", "bought", 0.3, needs=("new_coupon",)),
            _CLOSE,
        ),
    ),
    "charged_twice": Task(
        "payment",
        (
            _NEED,
            _ORDER_ID,
            Step("verify_identity", "identity", 0.2),
            Step("check_payment", "payment_checked", 0.3, needs=("order_id",)),
            Step("give_refund", "refunded", 0.4, needs=("payment_checked",)),
            _CLOSE,
        ),
        upset=True,
        told=("order_id",),
    ),
}
