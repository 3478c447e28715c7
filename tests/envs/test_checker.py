"""``check_env`` accepts a sound environment and names what is wrong with a broken one."""

import dataclasses
import random
import threading

import pytest

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.errors import DialogueError, SopError
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason, Strategy

CATALOGUE = (Strategy("ask", "ask", "ask"), Strategy("tell", "tell", "tell"), Strategy("end", "end", "end"))


class Talk(Dialogue):
    """Sound: ask and tell complete one subgoal each, end ends, after six turns the user leaves."""

    def __init__(self, goal, seed):
        self.goal, self.rng = goal, random.Random(f"{goal.id}/{seed}")
        self.used, self.done, self.over = [], set(), False
        self.opening = Observation(f"hello {self.rng.random()}", self.allowed())

    def allowed(self):
        return ("ask", "end") if not self.used else ("ask", "tell", "end")

    def briefing(self, strategy):
        return f"do {strategy}"

    def expected(self, strategy):
        return ()

    def reference_reply(self, strategy):
        return f"i {strategy}"

    def relevance(self):
        return {strategy: 3 if strategy in ("ask", "tell") else 0 for strategy in self.allowed()}

    def step(self, strategy, reply):
        if self.over:
            raise DialogueError("over")
        if strategy not in self.allowed():
            raise SopError("no")
        self.used.append(strategy)
        new = tuple(s for s in self.goal.subgoals if s == strategy and s not in self.done)
        self.done.update(new)
        stop = None
        if strategy == "end":
            stop = StopReason.COMPLETED if self.done == set(self.goal.subgoals) else StopReason.CLOSED
        elif len(self.used) >= 6:
            stop = StopReason.USER_LEFT
        self.over = stop is not None
        following = None if self.over else Observation(f"and {self.rng.random()}", self.allowed())
        return Outcome(("reply",), new, 0.5, bool(new), stop, following)


def goal(id_="g0", split="train", **changes):
    sound = Goal(id_, "talk", "desk 4", {"ask": 0.5, "tell": 0.5}, facts={"order": "A417"}, split=split)
    return dataclasses.replace(sound, **changes)


class Sound(Environment):
    name = "toy"
    max_turns = 8
    dialogue = Talk
    train = tuple(goal(f"g{n}") for n in range(16))  # enough walks to meet every fault below
    heldout = (goal("h0", "heldout"),)
    strategies = CATALOGUE

    @classmethod
    def load(cls, data):
        return cls()

    def goals(self, split):
        return getattr(self, split)

    def catalogue(self, goal):
        return self.strategies

    def start(self, goal, seed):
        return self.dialogue(goal, seed)


def test_a_sound_environment_passes():
    check_env(Sound())


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((goal(subgoals={"ask": 0.5, "tell": 0.4}),), "goal g0: subgoal weights sum to 0.9, not to 1"),
        ((goal(subgoals={}),), "goal g0: subgoal weights must be positive"),
        ((goal(subgoals={"ask": 1.5, "tell": -0.5}),), "goal g0: subgoal weights must be positive"),
        ((goal("h0"),), "goal h0: its id is listed in train and again in heldout"),
        ((goal(), goal()), "goal g0: its id is listed in train and again in train"),
        ((goal(split="heldout"),), "goal g0: listed in train, but its split is 'heldout'"),
        ((goal(context="order a417 is open"),), "goal g0: context gives away the hidden fact order='A417'"),
        ((goal(data={"f": lambda: 0}),), "goal g0: a goal must pickle"),
        ((goal(data={"f": object()}),), "goal g0: a goal must equal itself after pickling"),
    ],
)
def test_broken_goals(train, message):
    env = Sound()
    env.train = train
    with pytest.raises(DialogueError, match=message):
        check_env(env)


def test_a_fact_that_is_public_may_stand_in_the_context():
    env = Sound()
    env.train = (goal(context="order a417 is open"),)
    check_env(env, public=("order",))


def test_no_goals_and_goals_that_change():
    env = Sound()
    env.train = env.heldout = ()
    with pytest.raises(DialogueError, match="check_env toy, no goals in any split"):
        check_env(env)

    class Changing(Sound):
        def goals(self, split):
            return [goal(f"{split}{random.random()}", split)]

    with pytest.raises(DialogueError, match=r"goals\('train'\) changes"):
        check_env(Changing())


def test_a_catalogue_with_a_strategy_twice():
    env = Sound()
    env.strategies = (*CATALOGUE, CATALOGUE[0])
    with pytest.raises(DialogueError, match=r"lists a strategy twice: \['ask'\]"):
        check_env(env)


def broken(**methods):
    """Sound, with some methods of its dialogue replaced."""
    env = Sound()
    env.dialogue = type("Broken", (Talk,), methods)
    return env


def altered(**changes):
    """A step whose outcome has the given fields."""

    def step(self, strategy, reply):
        return dataclasses.replace(Talk.step(self, strategy, reply), **changes)

    return {"step": step}


def chatty_step(self, strategy, reply):
    self.used = self.used[-2:]  # forgets how long it has been going on
    if strategy == "end":
        self.used.append("ask")
        return Outcome(next=Observation("no", self.allowed()))
    return Talk.step(self, strategy, reply)


def endless_step(self, strategy, reply):
    if self.over:
        self.over = False
    return Talk.step(self, strategy, reply)


def permissive_step(self, strategy, reply):
    if self.over:
        raise DialogueError("over")
    return Talk.step(self, strategy if strategy in self.allowed() else "ask", reply)


def repeated_step(self, strategy, reply):
    self.done.discard(strategy)
    return Talk.step(self, strategy, reply)


def hasty_step(self, strategy, reply):
    outcome = Talk.step(self, strategy, reply)
    return dataclasses.replace(outcome, stop=StopReason.COMPLETED) if strategy == "end" else outcome


def crashing_step(self, strategy, reply):
    raise KeyError("price")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"allowed": lambda self: ()}, "turn 0: no strategy is allowed"),
        (
            {"allowed": lambda self: ("ask", "fly")},
            r"allowed strategies that are not in the catalogue: \['fly'",
        ),
        ({"allowed": lambda self: ("tell", "ask")}, "turn 0: allowed strategies must come once each and in catalogue"),
        ({"allowed": lambda self: ("ask", "ask")}, "turn 0: allowed strategies must come once each"),
        ({"allowed": lambda self: ["ask"]}, "turn 0: an observation is a string and a tuple"),
        ({"relevance": lambda self: {"ask": 3}}, r"turn 0: relevance grades \['ask'\], allowed are \['ask', 'end'\]"),
        ({"relevance": lambda self: dict.fromkeys(self.allowed(), 4)}, "turn 0: relevance grades are 0, 1, 2 or 3"),
        ({"relevance": lambda self: dict.fromkeys(self.allowed(), 0.5)}, "turn 0: relevance grades are 0, 1, 2 or 3"),
        ({"reference_reply": lambda self, strategy: " "}, "reference_reply one that is not blank"),
        ({"expected": lambda self, strategy: "A417"}, "expected must be a tuple of non-empty strings"),
        ({"briefing": lambda self, strategy: str(self.rng.random())}, "must not change when read twice"),
        (altered(engagement=1.5), "turn 0: engagement 1.5 is outside"),
        (altered(stop=None, next=None), "turn 0: exactly one of stop and next is set"),
        (altered(stop=StopReason.CLOSED), "turn 0: exactly one of stop and next is set"),
        (altered(completed=("fly",)), r"completed subgoals that the goal does not have: \['fly'\]"),
        (altered(on_task=False), "is on task"),
        (altered(stop=StopReason.FAILED, next=None), "fails by raising DialogueError"),
        ({"step": repeated_step}, "subgoals completed a second time"),
        ({"step": hasty_step}, "stopped as completed with open subgoals"),
        ({"step": chatty_step}, "a random walk goes on after 10 times max_turns=8 turns"),
        ({"step": endless_step}, "step after the end must raise DialogueError, raised nothing"),
        ({"step": permissive_step}, "step with 'tell', which is not allowed, must raise SopError, raised nothing"),
        ({"step": crashing_step}, "turn 0: step raised KeyError: 'price'"),
    ],
)
def test_broken_dialogues(methods, message):
    with pytest.raises(DialogueError, match=message):
        check_env(broken(**methods))


def test_noise_that_the_seed_does_not_fix():
    class Noisy(Talk):
        def __init__(self, goal, seed):
            super().__init__(goal, seed)
            self.rng = random.Random()

    env = Sound()
    env.dialogue = Noisy
    with pytest.raises(DialogueError, match="gave two transcripts"):
        check_env(env)


def test_dialogues_that_share_state():
    class Sharing(Talk):
        steps = 0

        def step(self, strategy, reply):
            outcome = super().step(strategy, reply)
            Sharing.steps += 1
            changed = dataclasses.replace(outcome, events=(f"step {Sharing.steps}",))
            Sharing.steps = 0 if outcome.stop else Sharing.steps
            return changed

    env = Sound()
    env.dialogue = Sharing
    with pytest.raises(DialogueError, match="gave two transcripts"):
        check_env(env)


@pytest.mark.parametrize("blocking", [True, False])
def test_dialogues_that_go_wrong_in_threads(blocking):
    """Sound as long as only one thread asks: the words come from where the thread keeps them."""

    class Scribbles(Sound):
        shared = threading.local()

        class dialogue(Talk):
            def step(self, strategy, reply):
                outcome = super().step(strategy, reply)
                if outcome.next and getattr(Scribbles.shared, "name", None) != "main":
                    return dataclasses.replace(outcome, next=Observation("who is there?", self.allowed()))
                return outcome

    Scribbles.blocking = blocking
    Scribbles.shared.name = "main"
    if not blocking:  # its dialogues never leave the loop's own thread
        check_env(Scribbles())
        return
    with pytest.raises(DialogueError, match=r"goal \w+, turn \d: in threads the same dialogue went another way"):
        check_env(Scribbles())
