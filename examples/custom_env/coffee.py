"""A coffee stand: a small but complete environment. The README beside this file explains it."""

import random
from pathlib import Path

from openrlhf_gopo.envs import Dialogue, Environment
from openrlhf_gopo.errors import DialogueError, SopError
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.sop import load_sop
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason

MENU = load_sop(Path(__file__).with_name("coffee.yaml"))
CATALOGUE, SOP = MENU.strategies, MENU.sop
DRINKS, SIZES = ("latte", "mocha", "tea", "cocoa", "water"), ("small", "medium", "large")
REPLIES = {"ask_drink": "What would you like?", "ask_size": "Which size?", "offer_cake": "Some cake with it?"}


class Coffee(Environment):
    name, blocking, max_turns = "coffee", False, 6

    @classmethod
    def load(cls, data):
        return cls()

    def goals(self, split):
        drinks = DRINKS[:4] if split == "train" else DRINKS[4:]
        return [goal(drink, size, split) for drink in drinks for size in SIZES]

    def catalogue(self, goal):
        return CATALOGUE

    def procedures(self):
        return {self.name: MENU}

    def start(self, goal, seed):
        return Order(goal, random.Random(f"{goal.id}/{seed}"))


def goal(drink, size, split):
    context = "You sell hot drinks at a coffee stand."  # all that the agent knows of the goal
    subgoals = {"drink": 0.2, "size": 0.3, "serve": 0.5}
    return Goal(f"{size}-{drink}", "order", context, subgoals, {"drink": drink, "size": size}, split=split)


class Order(Dialogue):
    def __init__(self, goal, rng):
        self.facts, self.rng = goal.facts, rng
        self.history, self.known, self.ended = [], set(), False
        self.opening = self.observe(rng.choice(("Hello!", "Good morning.")))

    def observe(self, user):
        self.allowed = SOP.allowed(self.history, self.known)
        return Observation(user, self.allowed)

    def briefing(self, strategy):
        return f"Say: {self.facts['drink']}." if strategy == "serve" else ""

    def expected(self, strategy):
        return (self.facts["drink"],) if strategy == "serve" else ()

    def relevance(self):
        grades = {"ask_drink": 3, "ask_size": 3, "offer_cake": 0, "serve": 3 if "size" in self.known else 1}
        return {strategy: grades[strategy] for strategy in self.allowed}

    def reference_reply(self, strategy):
        return REPLIES.get(strategy) or f"Here is your {self.facts['drink']}. Bye!"

    def step(self, strategy, reply):
        if self.ended:
            raise DialogueError("the dialogue is over")
        if strategy not in self.allowed:
            raise SopError(f"{strategy} {SOP.why_not(strategy, self.history, self.known)}")
        understood = bool(reply.strip()) and all(mentions(reply, text) for text in self.expected(strategy))
        subgoal = strategy.removeprefix("ask_")
        useful = understood and strategy != "offer_cake" and (strategy != "serve" or "size" in self.known)
        self.history.append(strategy)
        self.ended = strategy == "serve"
        self.known |= {subgoal} if useful else set()
        ending = StopReason.COMPLETED if self.known >= {"drink", "size", "serve"} else StopReason.CLOSED
        answer = self.facts[subgoal] if useful and not self.ended else self.rng.choice(("No.", "Hm?"))
        return Outcome(
            completed=(subgoal,) if useful else (),
            engagement=0.9 if useful else 0.2,
            on_task=useful,
            stop=ending if self.ended else None,
            next=None if self.ended else self.observe(answer),
        )
