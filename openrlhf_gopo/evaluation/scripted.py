"""The scripted policy: an imperfect script without a model, for behaviour cloning and as a baseline.

It reads ``relevance`` and ``reference_reply``, which look at the hidden goal: it shows what is achievable, and is no
fair competitor. ``skill=0`` is the row "random".
"""

from __future__ import annotations

import logging
import math
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.rewards.custom import Rewards
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


def play(
    env: Environment, goal: Goal, sample: int, seed: int, policy: ScriptedPolicy, rewards: Rewards | None = None
) -> Trajectory:
    """One scored dialogue without streams; ``seed`` is the user simulator's.

    An environment or reward that raises quarantines this trajectory alone: stop ``FAILED``, with ``error`` set.
    """
    trajectory = Trajectory(goal, sample, seed)
    rng = random.Random(f"{policy.seed}/{goal.id}/{sample}/{seed}")
    try:
        trajectory.stop = _converse(env, trajectory, policy, rng)
        trajectory.rewards = (rewards or Rewards()).score(trajectory)
    except Exception as error:  # whatever an environment raises must not end the evaluation of the others
        logger.warning("goal %s, sample %d failed: %r", goal.id, sample, error)
        trajectory.stop, trajectory.rewards = StopReason.FAILED, {}
        trajectory.error = f"{type(error).__name__}: {error}"
    return trajectory


def _converse(env: Environment, trajectory: Trajectory, policy: ScriptedPolicy, rng: random.Random) -> StopReason:
    """Fill ``trajectory.turns`` until the dialogue ends; the reason why it did."""
    order = [strategy.id for strategy in env.catalogue(trajectory.goal)]
    dialogue = env.start(trajectory.goal, trajectory.seed)
    trajectory.user = dialogue.user
    seen = dialogue.opening
    while len(trajectory.turns) < env.turn_limit(trajectory.goal):
        relevance = dict(dialogue.relevance())
        strategy, logprob = policy.choose(seen.allowed, relevance, order, rng)
        turn = Turn(
            user=seen.user,
            allowed=seen.allowed,
            strategy=strategy,
            reply=policy.reply(dialogue, strategy, seen.allowed, rng),
            briefing=dialogue.briefing(strategy),
            expected=dialogue.expected(strategy),
            relevance=relevance,
            expert_logprob=logprob,
            forced=len(seen.allowed) == 1,
        )
        outcome = dialogue.step(strategy, turn.reply)
        turn.events, turn.completed = outcome.events, outcome.completed
        turn.engagement, turn.on_task = outcome.engagement, outcome.on_task
        trajectory.turns.append(turn)
        if outcome.stop is not None:
            return outcome.stop
        if outcome.next is None:
            raise DialogueError(f"{env.name}: the outcome of {strategy!r} has neither stop nor next")
        seen = outcome.next
    return StopReason.MAX_TURNS


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
            raise DialogueError(f"{env.name}: {failures} demonstrations failed, the last with {trajectory.error}")
