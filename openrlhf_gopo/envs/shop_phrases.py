"""What the customer says: paraphrases by act, and what shows their persona. ``{slots}`` are the goal's values."""

from __future__ import annotations

from collections.abc import Mapping

# "vague.D" opens at desk D; "need.T" names the task T; "tell.X" tells the fact X; "want.M" hints at the mark M they
# wait for; the others answer what the desk did.
PHRASES: Mapping[str, tuple[str, ...]] = {
    "vague.presale": ("hi, can you help me choose?", "hello, i have a question", "hi, i want to buy something"),
    "vague.orders": (
        "hi, it is about my order",
        "hello, i need help with an order",
        "there is a problem with my order",
    ),
    "vague.payment": ("hi, it is about a payment", "hello, i have a problem with the payment", "hi, it is about money"),
    "need.advice": (
        "i want a {family}, which one should i take?",
        "can you suggest a good {family}?",
        "i am looking for a new {family}",
    ),
    "need.choice": (
        "which {family} is better, {item} or {other}?",
        "should i take the {family} {item} or {other}?",
        "i can not choose between {item} and {other}",
    ),
    "need.warranty": (
        "i like the {family} {item}, is there a warranty?",
        "how long is the warranty of the {family} {item}?",
        "what if the {family} {item} breaks, is there a warranty?",
    ),
    "need.late": ("my {family} has not come yet", "where is my {family}? it is late", "i still wait for my {family}"),
    "need.refund": (
        "i do not want the {family}, i want my money back",
        "i want to return the {family}",
        "can i get a refund for the {family}?",
    ),
    "need.damaged": (
        "my {family} came broken, i want a new one",
        "the {family} is broken, please send a new one",
        "i got a broken {family}",
    ),
    "need.address": (
        "i gave a wrong address for my {family}",
        "can you send my {family} to a new address?",
        "i have moved, my {family} goes to the old address",
    ),
    "need.declined": (
        "my card does not work for the {family} {item}",
        "i can not pay for the {family} {item}",
        "the payment for the {family} {item} was declined",
    ),
    "need.coupon": (
        "my coupon does not work for the {family} {item}",
        "i want the {family} {item} but the coupon fails",
        "the shop does not take my coupon for the {item}",
    ),
    "need.charged_twice": (
        "i paid two times for my {family}",
        "you took the money for the {family} twice",
        "i see two payments for one {family}",
    ),
    "tell.use": ("for {use}", "i use it for {use}", "it is for {use}"),
    "tell.budget": ("up to ${budget}", "i can spend ${budget}", "not more than ${budget}"),
    "tell.identity": ("my name is {name}", "{name}", "i am {name}"),
    "tell.order_id": ("it is {order_id}", "the order number is {order_id}", "order {order_id}"),
    "tell.photo": ("here is the photo", "i have sent the photo", "ok, see the photo"),
    "tell.address": ("it is {address}", "please send it to {address}", "the new one is {address}"),
    "tell.coupon": ("the code is {coupon}", "it is {coupon}", "{coupon}"),
    "want.item_found": ("so which one is good for me?", "what do you suggest?"),
    "want.compared": ("so which one is better?", "what is the difference?"),
    "want.stock_known": ("when can i have it?", "is it in stock?"),
    "want.warranty_known": ("how long is the warranty?", "and the warranty?"),
    "want.bought": ("i think i want it", "how can i get it?"),
    "want.order_found": ("can you see my order?", "did you find it?"),
    "want.traced": ("so where is it now?", "when will it come?"),
    "want.made_good": ("i had to wait so long", "what do i get for the wait?"),
    "want.terms_known": ("how does a return work?", "what are the rules?"),
    "want.refunded": ("i want my money back", "when do i get the money?"),
    "want.cared_for": ("i am not happy with this", "this is really bad"),
    "want.replaced": ("will you send a new one?", "i need a new one"),
    "want.address_changed": ("please change it", "can you change it now?"),
    "want.payment_checked": ("what went wrong?", "can you check the payment?"),
    "want.other_way": ("how else can i pay?", "what can i do now?"),
    "want.coupon_checked": ("why does it not work?", "what is wrong with it?"),
    "want.new_coupon": ("is there another coupon?", "i want it cheaper"),
    "want.wrapped_up": ("that is all", "i have all i need"),
    "progress": ("great, thanks", "good to know", "ok, that helps", "very good"),
    "buy": ("ok, i take it", "yes, i order it", "good, i buy it"),
    "cared": ("thank you, that is kind", "ok, thanks for that"),
    "idle": ("i do not see how that helps", "why do you say that?", "that is not what i need"),
    "repeat": ("you said that before", "again? we had that", "i told you already"),
    "wrong": ("no, i do not want that", "no, that is not for me"),
    "refuse": ("why do you want to know?", "i would rather not say", "do you need that?"),
    "expensive": ("hmm, that is expensive", "${now} is too much for me", "can it be cheaper?"),
    "unsure": ("hmm, i am not sure", "i must think about it"),
    "misfit": ("${best_price} is too much and not what i need", "that is not what i need, too expensive"),
    "held": ("what? you did not say that", "on hold? i want it now"),
    "pushy": ("are you only here to sell?", "i did not ask for that"),
    "extra_ok": ("nice, but not now", "maybe next time"),
    "confused": ("sorry, i do not understand", "what do you mean?", "i do not get it"),
    "leave": ("this is no use, bye", "i have to go, bye", "forget it"),
    "bye": ("thanks, bye", "great help, bye", "thank you, goodbye"),
    "cut_off": ("wait, we are not done", "but i need more help"),
}

# How a persona colours what it says.
FLAVOUR: Mapping[str, tuple[str, ...]] = {
    "hurried": ("please be quick", "i have no time"),
    "worried": ("i am worried", "i hope this is safe"),
    "thrifty": ("money is tight", "i look for a good price"),
    "doubtful": ("i do not know this shop", "is this shop good?"),
    "loyal": ("i like your shop", "i am always happy here"),
    "chatty": ("nice day today", "i told a friend about this"),
    "angry": ("this makes me angry", "this is bad service"),
}
