"""The scripted policy: an imperfect script without a model, for behaviour cloning and as a baseline.

It reads ``relevance`` and ``reference_reply``, which look at the hidden goal: it shows what is achievable, and is no
fair competitor. ``skill=0`` is the row "random".
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import ConfigError, DialogueError, visible
from openrlhf_gopo.rewards.custom import Rewards
from openrlhf_gopo.rollout.agent import Agent, Case, Choice, Reply
from openrlhf_gopo.rollout.dialogue import BUILT_IN, Limits, run_dialogue
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

logger = logging.getLogger(__name__)

SLIP = 0.05  # share of replies that the script takes from another strategy


@dataclass(frozen=True)
class ScriptedPolicy:
    """With probability ``skill`` the most relevant strategy, else one drawn uniformly from the allowed set.

    ``slip`` is the probability that a reply is the reference reply of another allowed strategy. ``seed`` varies the
    policy's own draws; equal (seed, goal, sample, dialogue seed) give equal dialogues in any order of play.

    Raises:
        ConfigError: ``skill`` or ``slip`` is outside [0, 1].
    """

    skill: float = 1.0
    seed: int = 0
    slip: float = SLIP

    def __post_init__(self) -> None:
        for name, value in (("skill", self.skill), ("slip", self.slip)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"scripted policy: {name} = {value} is not a probability; give a value in [0, 1]")

    def open(self, case: Case) -> Agent:
        """The script in one dialogue."""
        draws = random.Random(f"{self.seed}/{case.goal.id}/{case.sample}/{case.seed}")
        script = _Script(self, [strategy.id for strategy in case.catalogue], case.dialogue, draws)
        return Agent(script, script)

    def choose(
        self, allowed: Sequence[str], relevance: Mapping[str, int], order: Sequence[str], rng: random.Random
    ) -> tuple[str, float]:
        """A strategy and its log-probability (0.0 when forced); ties in relevance go to the first in ``order``."""
        best = max(allowed, key=lambda strategy: (relevance.get(strategy, 0), -order.index(strategy)))
        choice = best if rng.random() < self.skill else rng.choice(allowed)
        if len(allowed) == 1:
            return choice, 0.0
        probability = (1.0 - self.skill) / len(allowed) + (self.skill if choice == best else 0.0)
        return choice, math.log(probability)

    def reply(self, dialogue: Dialogue, strategy: str, allowed: Sequence[str], rng: random.Random) -> str:
        """The reference reply of ``strategy``, or of another allowed one when the script slips."""
        others = [other for other in allowed if other != strategy]
        slipped = rng.random() < self.slip and others
        return dialogue.reference_reply(rng.choice(others) if slipped else strategy)


@dataclass(frozen=True)
class _Script:
    policy: ScriptedPolicy
    order: Sequence[str]
    dialogue: Dialogue
    draws: random.Random

    async def choose(self, past: Sequence[Turn], turn: Turn) -> Choice:
        return Choice(*self.policy.choose(turn.allowed, turn.relevance, self.order, self.draws))

    async def write(self, past: Sequence[Turn], turn: Turn) -> Reply:
        return Reply(self.policy.reply(self.dialogue, turn.strategy, turn.allowed, self.draws))


def play(
    env: Environment, goal: Goal, sample: int, seed: int, policy: ScriptedPolicy, rewards: Rewards = BUILT_IN
) -> Trajectory:
    """One scored dialogue without streams, outside of any event loop; see ``run_dialogue``."""
    trajectory = asyncio.run(run_dialogue(env, goal, policy, Limits(), sample=sample, seed=seed, rewards=rewards))
    if trajectory.stop is StopReason.FAILED:
        logger.warning("sample %d failed: %s", sample, visible(trajectory.cause))
    return trajectory


def demonstrations(env: Environment, n: int, skill: float, seed: int, slip: float = SLIP) -> Iterator[Trajectory]:
    """Yield ``n`` scripted dialogues over the training goals, in their order, again and again with fresh user noise.

    Raises:
        DialogueError: there is no training goal, or more than ``max(n, 10)`` dialogues failed; fewer are skipped.
    """
    policy = ScriptedPolicy(skill, seed, slip)
    goals = env.goals("train")
    if not goals:
        raise DialogueError(f"{env.name}: no training goals to demonstrate; check --gopo.data")
    done = failures = 0
    while done < n:
        sample, index = divmod(done + failures, len(goals))
        goal = goals[index]
        trajectory = play(env, goal, sample, zlib.crc32(f"{seed}/{goal.id}/{sample}".encode()), policy)
        if trajectory.stop is not StopReason.FAILED:
            done += 1
            yield trajectory
            continue
        failures += 1
        if failures > max(n, 10):
            raise DialogueError(f"{env.name}: {failures} demonstrations failed, the last with {trajectory.cause}")
