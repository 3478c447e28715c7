from pathlib import Path

from openrlhf_gopo.envs import Environment, GuidedDialogue
from openrlhf_gopo.sop import load_sop
from openrlhf_gopo.types import Goal


class Order(GuidedDialogue):  # one conversation; self.known holds the facts the agent has learned
    def briefing(self, strategy):  # what the agent's systems tell it now
        return f"Say: {self.goal.facts['drink']}." if strategy == "serve" else ""

    def expected(self, strategy):  # what a faithful reply contains
        return (self.goal.facts["drink"],) if strategy == "serve" else ()

    def relevance(self):  # grades 0..3; may look at the hidden goal
        return {s: 1 if s == "serve" and "size" not in self.known else 3 for s in self.allowed}

    def reference_reply(self, strategy):  # for the warm start
        return f"Here is your {self.goal.facts['drink']}." if strategy == "serve" else "Which one?"

    def react(self, strategy):  # the customer
        if strategy == "serve":
            return self.end(completed=("serve",) if "size" in self.known else ())
        self.known.add(fact := strategy.removeprefix("ask_"))
        return self.answer(self.goal.facts[fact], completed=(fact,), engagement=0.9)


class Coffee(Environment):
    name, blocking, procedure = "coffee", False, load_sop(Path(__file__).with_name("coffee.yaml"))

    def goals(self, split):  # what customers want; the agent sees "coffee stand" only
        worth, drinks = {"drink": 0.2, "size": 0.3, "serve": 0.5}, ["latte", "tea", "cocoa", "mocha", "water"]
        return [
            Goal(f"{size}-{drink}", "order", "coffee stand", worth, {"drink": drink, "size": size}, split=split)
            for drink in (drinks[:4] if split == "train" else drinks[4:]) for size in ("small", "medium", "large")
        ]  # fmt: skip

    def start(self, goal, seed):
        return Order(goal, self.procedure.sop, "Good morning.")
