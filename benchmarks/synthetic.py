"""An environment of dialogues with a fixed number of turns and utterances of a fixed length: a load, not a task.

--gopo.env benchmarks/synthetic.py:Synthetic --gopo.data turns=3,words=16,goals=64
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason, Strategy

_TEXT = """order price refund parcel size colour today later please thanks address number card shop return small large
question help find send wait good again other item code red blue green"""
WORDS = _TEXT.split()
STRATEGIES = [
    Strategy(f"s{i}", f"strategy {i}", "What the agent may do now: " + " ".join(WORDS[2 * i : 2 * i + 6]))
    for i in range(12)
]
DEFAULTS = {"turns": 3, "words": 16, "context": 40, "goals": 64}


class Talk(Dialogue):
    """``turns`` turns, whatever is chosen and said."""

    user = "synthetic"

    def __init__(self, goal: Goal, seed: int, turns: int, words: int) -> None:
        self._random = random.Random(f"{goal.id}:{seed}")
        self._left, self._words = turns, words
        self.opening = self._observation()

    def _observation(self) -> Observation:
        return Observation(_text(self._random, self._words), tuple(s.id for s in STRATEGIES))

    def briefing(self, strategy: str) -> str:
        return "Say: " + " ".join(WORDS[: self._words // 4])

    def expected(self, strategy: str) -> tuple[str, ...]:
        return ()

    def step(self, strategy: str, reply: str) -> Outcome:
        self._left -= 1
        if self._left:
            # Some dialogues engage more than others, so that groups have a spread to learn from.
            return Outcome(engagement=self._random.random(), on_task=True, next=self._observation())
        return Outcome(completed=("talk",), engagement=self._random.random(), on_task=True, stop=StopReason.COMPLETED)

    def relevance(self) -> Mapping[str, int]:
        return {s.id: i % 4 for i, s in enumerate(STRATEGIES)}

    def reference_reply(self, strategy: str) -> str:
        return _text(self._random, self._words)


class Synthetic(Environment):
    """``data``: ``turns=3,words=16,context=40,goals=64``, each optional; lengths in words."""

    name, blocking = "synthetic", False

    def __init__(self, turns: int, words: int, context: int, goals: int) -> None:
        self.turns, self.words, self.max_turns = turns, words, turns + 1
        self._goals = {
            split: [
                Goal(f"{split}-{i}", "talk", _text(random.Random(f"{split}{i}"), context), {"talk": 1.0}, split=split)
                for i in range(count)
            ]
            for split, count in (("train", goals), ("heldout", 2))
        }

    @classmethod
    def load(cls, data: str | None) -> Synthetic:
        given = dict(part.partition("=")[::2] for part in data.split(",")) if data else {}
        if not given.keys() <= DEFAULTS.keys() or not all(value.isdigit() and int(value) for value in given.values()):
            raise ConfigError(f"--gopo.data {data}: give positive whole numbers, as in turns=3,words=16")
        return cls(**DEFAULTS | {name: int(value) for name, value in given.items()})

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        return STRATEGIES

    def goals(self, split: str) -> Sequence[Goal]:
        return self._goals[split]

    def start(self, goal: Goal, seed: int) -> Talk:
        return Talk(goal, seed, self.turns, self.words)


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))
