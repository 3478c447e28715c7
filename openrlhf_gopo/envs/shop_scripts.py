"""What the desk says: one script per strategy, in short replies from a small vocabulary that a tiny model can learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """One strategy's texts, with ``{slots}``. ``topic``: words of which a reply that asks must contain one."""

    briefing: str
    replies: tuple[str, ...]
    expected: tuple[str, ...] = ()
    topic: tuple[str, ...] = ()


_CARE = ("sorry", "apolog", "regret", "understand")

SCRIPTS: Mapping[str, Script] = {
    "clarify": Script(
        "ask: the need",
        ("How can I help you with this today?", "What do you need help with today?", "Tell me please, what can I do?"),
        topic=("help", "need", "do", "problem", "issue", "assist", "matter", "wrong", "looking"),
    ),
    "apologise": Script(
        "say sorry",
        (
            "I am very sorry about this, we will take care of it.",
            "I am sorry, I understand this is not nice for you.",
            "Please let me say sorry, I will help you now.",
        ),
        topic=_CARE,
    ),
    "ask_use": Script(
        "ask: the use",
        (
            "What will you use the {family} for?",
            "How do you want to use the {family}?",
            "What is the main use of the {family} for you?",
        ),
        topic=("use", "using", "purpose", "need it for"),
    ),
    "ask_budget": Script(
        "ask: the budget",
        (
            "How much do you want to spend on the {family}?",
            "What is your budget for the {family}?",
            "What price can you spend on the {family}?",
        ),
        topic=("budget", "spend", "price", "pay", "much"),
    ),
    "recommend": Script(
        "best match: {family} {item}, ${price}",
        (
            "I suggest the {family} {item}, it costs ${price}.",
            "The {family} {item} is a good match for you at ${price}.",
            "For you I would take the {family} {item}, the price is ${price}.",
        ),
        expected=("{item}", "${price}"),
    ),
    "recommend_early": Script(
        "use or budget not known, most sold: {family} {best}, ${best_price}",
        (
            "Many people like the {family} {best}, it costs ${best_price}.",
            "Our most sold {family} is the {best} at ${best_price}.",
        ),
        expected=("{best}", "${best_price}"),
    ),
    "compare": Script(
        "{item}: ${price}, good for {use}; {other}: ${other_price}, bigger",
        (
            "The {item} at ${price} is good for {use}, the {other} at ${other_price} is bigger.",
            "For {use} take the {item} at ${price}, the {other} is bigger and costs ${other_price}.",
        ),
        expected=("{item}", "${price}", "{other}", "${other_price}"),
    ),
    "compare_early": Script(
        "use not known; {item}: ${price}; {other}: ${other_price}, bigger",
        (
            "The {item} costs ${price}, the {other} is bigger and costs ${other_price}.",
            "You pay ${price} for the {item} and ${other_price} for the bigger {other}.",
        ),
        expected=("{item}", "${price}", "{other}", "${other_price}"),
    ),
    "check_stock": Script(
        "stock: {item} can arrive on {day}",
        (
            "We have the {item} here, it can arrive on {day}.",
            "Good news, the {item} can be with you on {day}.",
            "The {item} is here and you can have it on {day}.",
        ),
        expected=("{item}", "{day}"),
    ),
    "explain_warranty": Script(
        "warranty of {item}: {years} years",
        (
            "The {item} has a warranty of {years} years.",
            "You have {years} years of warranty on the {item}.",
            "Yes, the warranty of the {item} is {years} years.",
        ),
        expected=("{item}", "{years} years"),
    ),
    "offer_coupon": Script(
        "coupon {code}: ${off} off",
        (
            "Please take the coupon {code}, it gives you ${off} off.",
            "I can offer you ${off} off with the coupon {code}.",
            "Here is a coupon for you, {code} gives ${off} off.",
        ),
        expected=("{code}", "${off}"),
    ),
    "suggest_extra": Script(
        "extra: {extra}, ${extra_price}",
        (
            "Would you like to add {extra} for ${extra_price}?",
            "You could also take {extra}, it costs ${extra_price}.",
        ),
        expected=("${extra_price}",),
    ),
    "invite_to_buy": Script(
        "order: {item}, ${now}",
        (
            "Would you like to order the {item} for ${now} now?",
            "You can order the {item} now, you pay ${now}.",
            "Shall I put the {item} in your cart for ${now}?",
        ),
        expected=("{item}", "${now}"),
    ),
    "verify_identity": Script(
        "ask: the name",
        (
            "Please tell me your name, so I can verify your identity.",
            "What is your name please? I must verify your identity.",
            "To keep you safe, can you tell me your name?",
        ),
        topic=("name", "who", "identity", "verify"),
    ),
    "ask_order_id": Script(
        "ask: the order number",
        (
            "Can you tell me your order number please?",
            "What is the number of your order?",
            "Please give me the order number, then I can find it.",
        ),
        topic=("order", "number"),
    ),
    "look_up_order": Script(
        "order {order_id}: {family}, {status}",
        (
            "I found your order {order_id}, the {family} is {status}.",
            "Your order {order_id} is here, the {family} is {status}.",
            "I can see that the {family} of order {order_id} is {status}.",
        ),
        expected=("{order_id}", "{status}"),
    ),
    "ask_photo": Script(
        "ask: a photo",
        (
            "Can you send me a photo of the {family} please?",
            "Please send a photo, so I can see the {family}.",
            "I need a photo of the {family}, can you send one?",
        ),
        topic=("photo", "picture", "image"),
    ),
    "explain_policy": Script(
        "returns: {limit} days, fee ${fee}",
        (
            "You can return it in {limit} days, there is a fee of ${fee}.",
            "A return takes a fee of ${fee} and must be in {limit} days.",
            "You have {limit} days to return it, we keep a fee of ${fee}.",
        ),
        expected=("{limit} days", "${fee}"),
    ),
    "give_refund": Script(
        "refund done: ${refund}, order {order_id}",
        (
            "I have sent you the refund of ${refund} for order {order_id}.",
            "Done, you get ${refund} back for order {order_id}.",
            "The refund of ${refund} for order {order_id} is on its way.",
        ),
        expected=("${refund}", "{order_id}"),
    ),
    "send_replacement": Script(
        "new {family} sent: order {new_order}, arrives {later}",
        (
            "I have sent a new {family}, order {new_order}, you get it on {later}.",
            "A new {family} is on its way, order {new_order} can arrive on {later}.",
        ),
        expected=("{new_order}", "{later}"),
    ),
    "trace_parcel": Script(
        "parcel in {city}, arrives {later}",
        (
            "Your parcel is in {city} now, it can arrive on {later}.",
            "I found the parcel in {city}, you get it on {later}.",
            "The parcel is now in {city} and will be with you on {later}.",
        ),
        expected=("{city}", "{later}"),
    ),
    "ask_address": Script(
        "ask: the new address",
        (
            "What is the new address please?",
            "Please tell me the new address for the {family}.",
            "To which address do you want the {family}?",
        ),
        topic=("address", "where", "street"),
    ),
    "change_address": Script(
        "order {order_id} goes to {address}",
        (
            "Done, order {order_id} goes to {address} now.",
            "I have changed the address, order {order_id} goes to {address}.",
            "Your order {order_id} will now go to {address}.",
        ),
        expected=("{order_id}", "{address}"),
    ),
    "ask_coupon": Script(
        "ask: the coupon code",
        (
            "Can you tell me the coupon code please?",
            "What is the code of your coupon?",
            "Please give me the code, then I can check the coupon.",
        ),
        topic=("coupon", "code"),
    ),
    "check_coupon": Script(
        "coupon {coupon}: {reason}",
        (
            "I checked the coupon {coupon}, it is {reason}.",
            "Your coupon {coupon} does not work, it is {reason}.",
            "I see that the coupon {coupon} is {reason}.",
        ),
        expected=("{coupon}", "{reason}"),
    ),
    "check_payment": Script(
        "payment of order {order_id}: {fault}",
        (
            "I checked the payment of order {order_id}, I see {fault}.",
            "For order {order_id} the problem with the payment is {fault}.",
            "The payment of order {order_id} shows {fault}.",
        ),
        expected=("{order_id}", "{fault}"),
    ),
    "suggest_payment": Script(
        "can pay with {method}",
        (
            "You can pay with {method}, that will work.",
            "Please try to pay with {method} for this order.",
            "I would pay with {method} now, it works well.",
        ),
        expected=("{method}",),
    ),
    "on_hold": Script(
        "on hold: identity not verified",
        (
            "This is on hold, I must verify your identity first.",
            "I can not do this yet, your identity is not verified.",
        ),
    ),
    "close": Script(
        "say goodbye",
        (
            "Thank you for your time, have a good day!",
            "Thank you and goodbye, I am happy to help again.",
            "Have a nice day and thank you for your visit!",
        ),
    ),
}
