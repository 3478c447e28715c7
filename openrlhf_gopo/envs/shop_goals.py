"""The shop's goals: every task for every pair of product family and persona, generated from one fixed seed.

Train and heldout share no (family, persona) pair, so no heldout customer wants a product that a customer of the same
character wanted in training. Values (prices, ids, names) are drawn anew for every goal.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache

from openrlhf_gopo.envs.shop_tasks import TASKS
from openrlhf_gopo.types import Goal

SEED = 20260
TRAIN_VARIANTS, HELDOUT_VARIANTS = 2, 2

# family -> (lowest price in $, what people use it for)
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
}

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
}

NAMES = ("Ana", "Ben", "Chloe", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kim", "Leo", "Mia", "Noor")
STREETS = ("Oak", "Hill", "Lake", "Park", "Mill", "Rose", "Elm", "Bay")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
CITIES = ("Paris", "Rome", "Oslo", "Lyon", "Bern", "Porto")
STATUSES = {"late": ("on its way", "sent"), "address": ("on its way", "packed")}  # of other tasks: delivered
FAULTS = ("the card limit", "an old card", "a wrong code", "a bank block")
REASONS = ("expired", "used already", "not for this item", "only for new customers")
METHODS = ("bank transfer", "another card", "a gift card", "cash")
EXTRAS = ("a cover", "a cable", "a cloth", "a stand")


@lru_cache(maxsize=1)
def all_goals() -> Mapping[str, tuple[Goal, ...]]:
    """The goals of both splits, shuffled once, so that any first n of them mix tasks, families and personas."""
    rng = random.Random(SEED)
    pairs = [(family, persona) for family in FAMILIES for persona in PERSONAS]
    rng.shuffle(pairs)
    # Every persona gives a fifth of its families to heldout, so the slices by persona are of one size.
    heldout = {pair for persona in PERSONAS for pair in [p for p in pairs if p[1] == persona][: len(FAMILIES) // 5]}
    made: dict[str, list[Goal]] = {"train": [], "heldout": []}
    for pair in pairs:
        split = "heldout" if pair in heldout else "train"
        for variant in range(HELDOUT_VARIANTS if split == "heldout" else TRAIN_VARIANTS):
            made[split] += [_goal(task, *pair, variant, split) for task in TASKS]
    for goals in made.values():
        rng.shuffle(goals)
    return {split: tuple(goals) for split, goals in made.items()}


def _goal(task: str, family: str, persona: str, variant: int, split: str) -> Goal:
    id_ = f"shop-{task}-{family}-{persona}-{variant}"
    rng = random.Random(f"{SEED}/{id_}")
    patience, trust, price_sensitivity, talk = PERSONAS[persona]
    data = _slots(rng, family)
    data["status"] = rng.choice(STATUSES.get(task, ("delivered",)))
    if task == "charged_twice":
        data["fault"] = "two payments"
    regular = rng.random() < trust  # a public hint at a hidden trait: those who trust the shop have bought before
    return Goal(
        id=id_,
        intent=task,
        context=f"{TASKS[task].desk} desk, {'regular' if regular else 'new'} customer",
        subgoals=TASKS[task].subgoals,
        facts=_facts(rng, task, data),
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
    """Every value that a briefing can state; prices in whole dollars."""
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
        **{"limit": rng.choice((14, 30, 60)), "fee": fee, "refund": price - fee},
        **{"coupon": f"Q{rng.randrange(1, 10)}", "reason": rng.choice(REASONS), "fault": rng.choice(FAULTS)},
        **{"method": rng.choice(METHODS), "extra": rng.choice(EXTRAS), "extra_price": rng.randrange(3, 9)},
        **{"name": rng.choice(NAMES), "address": f"{rng.choice(STREETS)} {rng.randrange(1, 10)}"},
    }


def _facts(rng: random.Random, task: str, slots: Mapping[str, str | int]) -> dict[str, str]:
    steps = {step.mark for step in TASKS[task].steps}
    known = {"use": slots["use"], "budget": f"${slots['budget']}", "identity": slots["name"]}
    known |= {"order_id": slots["order_id"], "address": slots["address"], "coupon": slots["coupon"]}
    known |= {"photo": rng.choice(("a crack", "a dent", "a broken part", "a hole"))}
    return {"need": f"{task} {slots['family']}", **{name: str(known[name]) for name in known if name in steps}}
