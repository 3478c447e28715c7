"""``check_env``: does an environment keep the contract of ``envs/base.py``? Run it on every environment you write.

    from openrlhf_gopo.envs.checker import check_env
    check_env(MyEnvironment.load(None))

It plays random walks with the reference replies, so it finds what random play meets, not every fault.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import NoReturn, TypeVar

from openrlhf_gopo.envs.base import SPLITS, Dialogue, Environment
from openrlhf_gopo.errors import DialogueError, SopError
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason

T = TypeVar("T")

_SUM = 1e-6  # how far from 1 the subgoal weights may sum
_THREADS = 4  # dialogues of a blocking environment that are played at once
_TURNS = 10  # a random walk ends, or reaches the rollout's limit, within this many times max_turns


def check_env(env: Environment, *, goals: int = 20, seed: int = 0, public: Collection[str] = ()) -> None:
    """Check the data of every goal, and play ``goals`` random dialogues of each split (or all it has, if fewer).

    ``public``: names of facts whose value the context may state, such as a date that is also today's.

    Raises:
        DialogueError: the first fault found: what it is, and at which goal and turn.
    """
    _check_goals(env, public)
    for split in SPLITS:
        listed = list(env.goals(split))
        for goal in random.Random(f"{seed}/{split}").sample(listed, min(goals, len(listed))):
            _Walker(env, goal, seed).check()


def _check_goals(env: Environment, public: Collection[str]) -> None:
    owner: dict[str, str] = {}
    for split in SPLITS:
        listed = env.goals(split)
        if [goal.id for goal in listed] != [goal.id for goal in env.goals(split)]:
            _fault(env, f"goals({split!r}) changes from one call to the next")
        for goal in listed:
            if goal.id in owner:
                _fault(env, f"goal {goal.id}: its id is listed in {owner[goal.id]} and again in {split}")
            owner[goal.id] = split
            _check_goal(env, goal, split, public)
    if not owner:
        _fault(env, "no goals in any split")


def _check_goal(env: Environment, goal: Goal, split: str, public: Collection[str]) -> None:
    where = f"goal {goal.id}"
    if goal.split != split:
        _fault(env, f"{where}: listed in {split}, but its split is {goal.split!r}")
    if not goal.subgoals or min(goal.subgoals.values()) <= 0:
        _fault(env, f"{where}: subgoal weights must be positive: {dict(goal.subgoals)}")
    if abs(sum(goal.subgoals.values()) - 1.0) > _SUM:
        _fault(env, f"{where}: subgoal weights sum to {sum(goal.subgoals.values()):.6g}, not to 1")
    for fact, value in goal.facts.items():
        if value and fact not in public and mentions(goal.context, value):
            _fault(env, f"{where}: context gives away the hidden fact {fact}={value!r}; if it may, name it in public")
    try:
        same = pickle.loads(pickle.dumps(goal)) == goal
    except Exception as error:
        _fault(env, f"{where}: a goal must pickle: {type(error).__name__}: {error}")
    if not same:
        _fault(env, f"{where}: a goal must equal itself after pickling")


@dataclass(frozen=True)
class _Seen:
    """One turn as seen from outside: equal walks give equal lists of these."""

    observation: Observation
    strategy: str
    briefing: str
    expected: tuple[str, ...]
    relevance: Mapping[str, int]
    reply: str
    outcome: Outcome


class _Walker:
    """Random walks of one goal."""

    def __init__(self, env: Environment, goal: Goal, seed: int) -> None:
        self.env, self.goal, self.seed = env, goal, seed
        self.catalogue = [strategy.id for strategy in env.catalogue(goal)]
        self.turn = 0

    def check(self) -> None:
        twice = [id_ for id_, count in Counter(self.catalogue).items() if count > 1]
        if twice or not self.catalogue:
            _fault(self.env, f"goal {self.goal.id}: catalogue is empty or lists a strategy twice: {twice}")
        first = self.walk()
        # Another dialogue advances in between: dialogues of one environment must not touch each other.
        second = self.walk(beside=self.start(self.seed + 1))
        self.compare(first, second, "same goal, seed, strategies and replies gave two transcripts")
        if self.env.blocking:  # the rollout calls it from threads, many dialogues at once
            others = [_Walker(self.env, self.goal, self.seed) for _ in range(_THREADS)]
            with ThreadPoolExecutor(_THREADS) as pool:
                for walk in pool.map(_Walker.walk, others):
                    self.compare(first, walk, "in threads the same dialogue went another way")
        self.check_forbidden()

    def compare(self, first: list[_Seen], second: list[_Seen], what: str) -> None:
        for turn, (one, other) in enumerate(zip_longest(first, second)):
            if one != other:
                self.turn = turn
                self.fault(f"{what}: {one} and {other}")

    def start(self, seed: int) -> Dialogue:
        self.turn = 0
        return self.call("start", lambda: self.env.start(self.goal, seed))

    def walk(self, beside: Dialogue | None = None) -> list[_Seen]:
        """One dialogue to its end, checked turn by turn."""
        dialogue = self.start(self.seed)
        rng = random.Random(f"{self.goal.id}/{self.seed}")
        by = random.Random(0)
        observation, done, seen = dialogue.opening, set[str](), list[_Seen]()
        while True:
            self.check_observation(observation)
            seen.append(self.play(dialogue, observation, rng.choice(observation.allowed)))
            outcome = seen[-1].outcome
            self.check_outcome(outcome, done)
            done.update(outcome.completed)
            if outcome.next is None:
                break
            beside = beside and self.advance(beside, by)
            observation, self.turn = outcome.next, self.turn + 1
            if self.turn >= _TURNS * self.env.max_turns:
                self.fault(f"a random walk goes on after {_TURNS} times max_turns={self.env.max_turns} turns")
        self.check_single_use(dialogue, seen[-1])
        return seen

    def advance(self, dialogue: Dialogue, rng: random.Random) -> Dialogue | None:
        """One turn of a dialogue that nobody watches; None when it ended."""
        strategy = rng.choice(sorted(dialogue.relevance()))
        outcome = self.call("step", lambda: dialogue.step(strategy, dialogue.reference_reply(strategy)))
        return None if outcome.stop else dialogue

    def play(self, dialogue: Dialogue, observation: Observation, strategy: str) -> _Seen:
        """Read everything, twice for each allowed strategy, then take one turn."""
        readings = [{s: self.read(dialogue, s) for s in observation.allowed} for _ in range(2)]
        if readings[0] != readings[1]:
            self.fault("briefing, expected, relevance and reference_reply must not change when read twice")
        briefing, expected, relevance, reply = readings[0][strategy]
        if set(relevance) != set(observation.allowed):
            self.fault(f"relevance grades {sorted(relevance)}, allowed are {sorted(observation.allowed)}")
        bad = {s: grade for s, grade in relevance.items() if grade not in (0, 1, 2, 3)}
        if bad:
            self.fault(f"relevance grades are 0, 1, 2 or 3: {bad}")
        outcome = self.call("step", lambda: dialogue.step(strategy, reply))
        return _Seen(observation, strategy, briefing, expected, relevance, reply, outcome)

    def read(self, dialogue: Dialogue, strategy: str) -> tuple[str, tuple[str, ...], Mapping[str, int], str]:
        briefing = self.call("briefing", lambda: dialogue.briefing(strategy))
        expected = self.call("expected", lambda: dialogue.expected(strategy))
        reply = self.call("reference_reply", lambda: dialogue.reference_reply(strategy))
        if not isinstance(briefing, str) or not isinstance(reply, str) or not reply.strip():
            self.fault(f"{strategy}: briefing must be a string, reference_reply one that is not blank: {reply!r}")
        if not isinstance(expected, tuple) or not all(isinstance(s, str) and s for s in expected):
            self.fault(f"{strategy}: expected must be a tuple of non-empty strings: {expected!r}")
        return briefing, expected, dict(self.call("relevance", dialogue.relevance)), reply

    def check_observation(self, observation: Observation) -> None:
        allowed = observation.allowed
        if not isinstance(observation.user, str) or not isinstance(allowed, tuple):
            self.fault("an observation is a string and a tuple of strategies")
        if not allowed:
            self.fault("no strategy is allowed")
        unknown = [strategy for strategy in allowed if strategy not in self.catalogue]
        if unknown:
            self.fault(f"allowed strategies that are not in the catalogue: {unknown}")
        if list(allowed) != [strategy for strategy in self.catalogue if strategy in allowed]:
            self.fault(f"allowed strategies must come once each and in catalogue order: {allowed}")

    def check_outcome(self, outcome: Outcome, done: set[str]) -> None:
        if (outcome.stop is None) == (outcome.next is None):
            self.fault(f"exactly one of stop and next is set: stop={outcome.stop}, next={outcome.next}")
        if not 0.0 <= outcome.engagement <= 1.0:
            self.fault(f"engagement {outcome.engagement} is outside [0, 1]")
        unknown = [subgoal for subgoal in outcome.completed if subgoal not in self.goal.subgoals]
        if unknown:
            self.fault(f"completed subgoals that the goal does not have: {unknown}")
        again = [subgoal for subgoal in outcome.completed if subgoal in done]
        if again:
            self.fault(f"subgoals completed a second time: {again}")
        if outcome.completed and not outcome.on_task:
            self.fault(f"a turn that completes {outcome.completed} is on task")
        missing = set(self.goal.subgoals) - done - set(outcome.completed)
        if outcome.stop is StopReason.COMPLETED and missing:
            self.fault(f"stopped as completed with open subgoals: {sorted(missing)}")
        if outcome.stop is StopReason.FAILED:
            self.fault("a dialogue fails by raising DialogueError, not by stopping as failed")

    def check_single_use(self, dialogue: Dialogue, last: _Seen) -> None:
        self.refuses(DialogueError, dialogue, last.strategy, "step after the end")

    def check_forbidden(self) -> None:
        dialogue = self.start(self.seed)
        outside = [strategy for strategy in self.catalogue if strategy not in dialogue.opening.allowed]
        for strategy in (*outside[:1], "no such strategy"):
            self.refuses(SopError, dialogue, strategy, f"step with {strategy!r}, which is not allowed,")

    def refuses(self, kind: type[Exception], dialogue: Dialogue, strategy: str, what: str) -> None:
        got = "nothing"
        try:
            dialogue.step(strategy, "hello")
        except kind:
            return
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        self.fault(f"{what} must raise {kind.__name__}, raised {got}")

    def call(self, method: str, fn: Callable[[], T]) -> T:
        try:
            return fn()
        except Exception as error:
            text = f"{self.where()}: {method} raised {type(error).__name__}: {error}"
            raise DialogueError(f"check_env {self.env.name}, {text}") from error

    def where(self) -> str:
        return f"goal {self.goal.id}, turn {self.turn}"

    def fault(self, what: str) -> NoReturn:
        _fault(self.env, f"{self.where()}: {what}")


def _fault(env: Environment, what: str) -> NoReturn:
    raise DialogueError(f"check_env {env.name}, {what}")
