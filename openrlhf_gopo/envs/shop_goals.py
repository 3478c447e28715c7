"""The shop's goals: every task for every pair of product family and persona, drawn from one fixed seed.

What is held out: four product families and two personas altogether, and a fifth of the other (family, persona) pairs.
The two personas join traits that training only shows apart (``shy``: patient and distrustful, says nothing unasked;
``haggling``: trusting, and yet price sensitive). The families are like others in price and use, and all other words of
their goals occur in training. Prices, stock, ids and names are drawn anew for every goal, so that they must be read
from the briefing and cannot be learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import overload

from openrlhf_gopo.envs.shop_tasks import TASKS
from openrlhf_gopo.envs.shop_texts import load_texts
from openrlhf_gopo.types import Goal

SEED = 20260
VARIANTS = {"train": 8, "heldout": 2}  # goals for each task, family and persona

# family -> (lowest price, what people use it for)
FAMILIES: Mapping[str, tuple[int, tuple[str, str]]] = {
    "lamp": (15, ("reading", "sleep")),
    "kettle": (20, ("tea", "travel")),
    "jacket": (40, ("rain", "work")),
    "shoes": (35, ("running", "work")),
    "bag": (25, ("travel", "school")),
    "headset": (30, ("music", "games")),
    "keyboard": (25, ("games", "work")),
    "mouse": (12, ("games", "school")),
    "chair": (60, ("work", "reading")),
    "desk": (80, ("school", "work")),
    "tent": (70, ("rain", "travel")),
    "watch": (45, ("running", "work")),
    "camera": (90, ("travel", "school")),
    "speaker": (35, ("music", "travel")),
    "pillow": (12, ("sleep", "travel")),
    "bottle": (10, ("running", "tea")),
    "phone": (95, ("music", "work")),
    "bike": (99, ("work", "school")),
    "clock": (14, ("sleep", "school")),
    "fan": (22, ("sleep", "work")),
    "boots": (50, ("rain", "work")),
    "tablet": (85, ("reading", "games")),
    "cup": (10, ("tea", "travel")),
    "sofa": (90, ("reading", "sleep")),
}
UNSEEN_FAMILIES = frozenset({"boots", "tablet", "cup", "sofa"})

# persona -> (patience in turns of nuisance, trust 0..1, price sensitivity 0..1, chance to tell facts unasked)
PERSONAS: Mapping[str, tuple[float, float, float, float]] = {
    "calm": (4.7, 0.60, 0.3, 0.4),
    "hurried": (2.7, 0.55, 0.3, 0.8),
    "worried": (4.2, 0.35, 0.4, 0.4),
    "thrifty": (4.2, 0.50, 0.9, 0.4),
    "doubtful": (4.2, 0.25, 0.5, 0.1),
    "loyal": (5.2, 0.80, 0.25, 0.4),
    "chatty": (4.7, 0.55, 0.5, 0.9),
    "angry": (2.7, 0.35, 0.45, 0.3),
    "shy": (4.7, 0.40, 0.3, 0.05),
    "haggling": (4.7, 0.65, 0.8, 0.6),
}
UNSEEN_PERSONAS = frozenset({"shy", "haggling"})

NAMES = ("Ana", "Ben", "Chloe", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kim", "Leo", "Mia", "Noor")
STREETS = ("Oak", "Hill", "Lake", "Park", "Mill", "Rose", "Elm", "Bay")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
CITIES = ("Paris", "Rome", "Oslo", "Lyon", "Bern", "Porto")
STATUSES = {"late": ("on its way", "sent"), "address": ("on its way", "packed")}  # of other tasks: delivered
FAULTS = ("the card limit", "an old card", "a wrong code", "a bank block")
REASONS = ("expired", "used already", "not for this item", "only for new customers")
METHODS = ("bank transfer", "another card", "a gift card", "cash")
EXTRAS = ("a cover", "a cable", "a cloth", "a stand")
DAMAGES = ("a crack", "a dent", "a broken part", "a hole")
COLOURS = ("red", "blue", "green", "black", "white", "grey")
WISHES = frozenset({"advice", "choice", "warranty"})  # tasks in which some customers want one colour

Key = tuple[str, str, str, int]  # task, family, persona, variant


class Goals(Sequence[Goal]):
    """The goals of one split in one language, each made when asked for. Shuffled, so any first n mix everything."""

    def __init__(self, split: str, language: str) -> None:
        self._split, self._language, self._keys = split, language, _keys()[split]

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Goal: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Goal]: ...
    def __getitem__(self, index: int | slice) -> Goal | Sequence[Goal]:
        if isinstance(index, slice):
            return [_goal(key, self._split, self._language) for key in self._keys[index]]
        return _goal(self._keys[index], self._split, self._language)


@lru_cache(maxsize=1)
def _keys() -> Mapping[str, list[Key]]:
    rng = random.Random(SEED)
    seen = [f for f in FAMILIES if f not in UNSEEN_FAMILIES]
    # Every persona gives a fifth of its families to heldout, so its slices are of one size.
    heldout = {(f, p) for p in PERSONAS for f in rng.sample(seen, len(seen) // 5)}
    heldout |= {(f, p) for f in FAMILIES for p in PERSONAS if f in UNSEEN_FAMILIES or p in UNSEEN_PERSONAS}
    keys: dict[str, list[Key]] = {"train": [], "heldout": []}
    for family in FAMILIES:
        for persona in PERSONAS:
            split = "heldout" if (family, persona) in heldout else "train"
            keys[split] += [(task, family, persona, n) for task in TASKS for n in range(VARIANTS[split])]
    for listed in keys.values():
        rng.shuffle(listed)
    return keys


def _goal(key: Key, split: str, language: str) -> Goal:
    task, family, persona, variant = key
    texts = load_texts(language)
    id_ = f"shop-{task}-{family}-{persona}-{variant}"
    rng = random.Random(f"{SEED}/{id_}")
    patience, trust, price_sensitivity, talk = PERSONAS[persona]
    drawn = _slots(rng, family) | _case(rng, task)
    drawn["status"] = rng.choice(STATUSES.get(task, ("delivered",)))
    if task == "charged_twice":
        drawn["fault"] = "two payments"
    data = {name: texts.word(value) if isinstance(value, str) else value for name, value in drawn.items()}
    data["address"] = texts.address.format(street=data.pop("street"), number=data.pop("number"))
    photo = texts.word(rng.choice(DAMAGES))
    regular = rng.random() < trust  # a public hint at a hidden trait: those who trust the shop have bought before
    known = {
        **{"need": f"{texts.word(task)} {data['family']}", "use": data["use"], "wish": data["wish"], "photo": photo},
        **{"budget": texts.money.format(amount=data["budget"]), "identity": data["name"], "address": data["address"]},
        **{"order_id": data["order_id"], "coupon": data["coupon"]},
    }
    steps = TASKS[task].steps_for(data)
    told = {"need", *(step.mark for step in steps), *(["wish"] if data["wish"] else [])}
    return Goal(
        id=id_,
        intent=task,
        context=texts.context.format(
            desk=texts.word(TASKS[task].desk), known=texts.word("regular" if regular else "new")
        ),
        subgoals={step.mark: step.weight for step in steps if step.weight},
        facts={name: str(value) for name, value in known.items() if name in told},
        persona={
            "type": persona,
            "patience": round(patience + rng.uniform(-0.5, 0.5), 2),
            "trust": round(trust + rng.uniform(-0.1, 0.1), 2),
            "price_sensitivity": round(price_sensitivity + rng.uniform(-0.1, 0.1), 2),
        },
        data={**data, "vague": rng.random() < 0.45, "talks": rng.random() < talk},
        split=split,
    )


def _slots(rng: random.Random, family: str) -> dict[str, str | int]:
    """Every value that a text can state, in English; prices in whole dollars."""
    lowest, uses = FAMILIES[family]
    letter = family[0].upper()
    item, other, best = (f"{letter}{n}" for n in rng.sample(range(2, 10), 3))
    price = lowest + rng.randrange(0, 20)
    off = rng.randrange(3, 8)
    order, new_order = (f"{rng.choice('ABCD')}{n}" for n in rng.sample(range(1, 10), 2))
    day, later = sorted(rng.sample(range(len(DAYS)), 2))
    fee = rng.randrange(2, 6)
    return {
        **{"family": family, "use": rng.choice(uses), "item": item, "other": other, "best": best},
        **{"price": price, "other_price": price + rng.randrange(4, 12), "best_price": price + rng.randrange(12, 30)},
        **{"off": off, "total": price - off, "code": f"S{rng.randrange(1, 10)}", "budget": price + 3},
        **{"order_id": order, "new_order": new_order},
        **{"day": DAYS[day], "later": DAYS[later], "city": rng.choice(CITIES), "years": rng.randrange(2, 6)},
        **{"fee": fee, "refund": price - fee, "weeks": rng.randrange(2, 6)},
        **{"coupon": f"Q{rng.randrange(1, 10)}", "reason": rng.choice(REASONS), "fault": rng.choice(FAULTS)},
        **{"method": rng.choice(METHODS), "extra": rng.choice(EXTRAS), "extra_price": rng.randrange(3, 9)},
        **{"name": rng.choice(NAMES), "street": rng.choice(STREETS), "number": rng.randrange(1, 10)},
    }


def _case(rng: random.Random, task: str) -> dict[str, str | int]:
    """What is special about this goal: a wish for one colour and the stock of it; an order that is too old to return.

    ``stock``: ``here``, ``other`` (only in the colour ``free``) or ``back`` (on back-order, for ``weeks``).
    """
    wish, free = rng.sample(COLOURS, 2)
    wished = task in WISHES and rng.random() < 0.4
    stock = rng.choice(("here", "other", "back")) if wished else "here"
    limit = rng.choice((14, 30, 60))  # days to return
    too_old = task == "refund" and rng.random() < 0.4
    age = limit + rng.randrange(1, 30) if too_old else rng.randrange(2, limit)
    case: dict[str, str | int] = {"wish": wish if wished else "", "free": free, "stock": stock}
    return case | {"limit": limit, "too_old": too_old, "age": age}
