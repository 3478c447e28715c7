"""The shop's 26 strategies and the SOP that its desks follow."""

from __future__ import annotations

from openrlhf_gopo.sop import Part, Rule, Sop
from openrlhf_gopo.types import Strategy

# fmt: off
STRATEGIES = (
    Strategy("clarify", "clarify", "ask what the customer needs", asks=("need",)),
    Strategy("apologise", "apologise", "apologise and show care"),
    Strategy("ask_use", "ask use", "ask what the product is for", asks=("use",)),
    Strategy("ask_budget", "ask budget", "ask how much they can spend", asks=("budget",)),
    Strategy("recommend", "recommend", "suggest one item with its price", gives=("item", "price")),
    Strategy("compare", "compare", "compare two items and prices", gives=("item", "price")),
    Strategy("check_stock", "check stock", "tell when the item can arrive", gives=("item", "day")),
    Strategy("explain_warranty", "explain warranty", "tell how long the warranty is", gives=("warranty",)),
    Strategy("offer_coupon", "offer coupon", "offer a coupon code", gives=("code",)),
    Strategy("suggest_extra", "suggest extra", "suggest an extra item to add", gives=("extra",)),
    Strategy("invite_to_buy", "invite to buy", "invite them to order the item", gives=("item", "total")),
    Strategy("verify_identity", "verify identity", "ask for the name to verify identity", asks=("identity",)),
    Strategy("ask_order_id", "ask order number", "ask for the order number", asks=("order_id",)),
    Strategy("look_up_order", "look up order", "find the order and tell its status", gives=("status",)),
    Strategy("ask_photo", "ask photo", "ask for a photo of the damage", asks=("photo",)),
    Strategy("explain_policy", "explain policy", "explain return time and fee", gives=("terms",)),
    Strategy("give_refund", "give refund", "refund the money", gives=("refund",), does=("refund",)),
    Strategy("send_replacement", "send replacement", "send a new item", gives=("new_order",), does=("replace",)),
    Strategy("trace_parcel", "trace parcel", "find the parcel, tell the new date", gives=("day",)),
    Strategy("ask_address", "ask address", "ask for the new address", asks=("address",)),
    Strategy("change_address", "change address", "set the new delivery address", does=("change_address",)),
    Strategy("ask_coupon", "ask coupon code", "ask for the coupon code", asks=("coupon",)),
    Strategy("check_coupon", "check coupon", "tell why the coupon fails", gives=("reason",)),
    Strategy("check_payment", "check payment", "tell what went wrong with the payment", gives=("fault",)),
    Strategy("suggest_payment", "suggest payment", "suggest another way to pay", gives=("method",)),
    Strategy("close", "close", "say goodbye and end the dialogue"),
)
# fmt: on

# What the desk can know: told by the customer, or found in its own systems.
FACTS = (
    "need",
    "use",
    "budget",
    "identity",
    "order_id",
    "photo",
    "address",
    "coupon",
    "order_found",
    "payment_checked",
)

_COMMON = ("clarify", "apologise", "offer_coupon", "close")
_SALE = ("invite_to_buy", "suggest_extra")
_IDS = ("verify_identity", "ask_order_id")
_PRESALE = ("ask_use", "ask_budget", "recommend", "compare", "check_stock", "explain_warranty")
_AFTER_SALE = ("give_refund", "send_replacement", "trace_parcel", "change_address")
_ORDERS = (*_IDS, "look_up_order", "ask_photo", "explain_policy", "ask_address", *_AFTER_SALE)
_PAYMENT = (*_IDS, "ask_coupon", "check_coupon", "check_payment", "suggest_payment", "give_refund")

SOP = Sop(
    name="shop",
    strategies=tuple(strategy.id for strategy in STRATEGIES),
    facts=FACTS,
    terminal=("close",),
    rules=(
        *(Rule(strategy.id, without_facts=strategy.asks) for strategy in STRATEGIES if strategy.asks),
        Rule("clarify", no_repeat=True),
        Rule("apologise", max_uses=2, no_repeat=True),
        Rule("offer_coupon", max_uses=2, no_repeat=True),
        Rule("recommend", requires_facts=("need",), max_uses=3),
        Rule("compare", requires_facts=("need",), max_uses=2),
        Rule("check_stock", requires_facts=("need",), max_uses=2),
        Rule("explain_warranty", requires_facts=("need",), max_uses=2),
        Rule("invite_to_buy", max_uses=3),
        Rule("suggest_extra", after=("invite_to_buy",), max_uses=1),
        Rule("look_up_order", requires_facts=("order_id",), max_uses=2),
        Rule("ask_photo", requires_facts=("need",), max_uses=2),
        Rule("explain_policy", requires_facts=("need",), max_uses=2),
        Rule("give_refund", max_uses=3),
        Rule("send_replacement", requires_facts=("order_found",), after=("ask_photo",), max_uses=3),
        Rule("trace_parcel", requires_facts=("order_found",), max_uses=2),
        Rule("ask_address", requires_facts=("need",), max_uses=2),
        Rule("change_address", requires_facts=("order_found", "address"), max_uses=3),
        Rule("ask_coupon", requires_facts=("need",), max_uses=2),
        Rule("check_coupon", requires_facts=("coupon",), max_uses=2),
        Rule("check_payment", requires_facts=("need", "order_id"), max_uses=3),
        Rule("suggest_payment", requires_facts=("need",), max_uses=2),
    ),
    parts=(
        Part(
            "presale",
            (*_COMMON, *_SALE, *_PRESALE),
            rules=(
                Rule("invite_to_buy", after_any=("recommend", "compare", "check_stock")),
                Rule(
                    "offer_coupon", after_any=("ask_budget", "recommend", "compare", "check_stock", "explain_warranty")
                ),
                Rule("close", after=("invite_to_buy",)),
            ),
        ),
        Part(
            "orders",
            (*_COMMON, *_ORDERS),
            rules=(
                Rule("give_refund", requires_facts=("order_found",), after=("explain_policy",)),
                Rule("offer_coupon", after=("look_up_order",)),
            ),
            mandatory=("look_up_order",),
        ),
        Part(
            "payment",
            (*_COMMON, *_SALE, *_PAYMENT),
            rules=(
                Rule("give_refund", requires_facts=("payment_checked",)),
                Rule("invite_to_buy", after_any=("suggest_payment", "check_coupon")),
                Rule("offer_coupon", after_any=("ask_coupon", "suggest_payment")),
                Rule("close", after_any=("invite_to_buy", "give_refund")),
            ),
        ),
    ),
)
