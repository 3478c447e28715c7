"""One dialogue, from the first utterance to its stop reason. Knows neither vLLM nor Ray."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from openrlhf_gopo.envs.base import Environment
from openrlhf_gopo.errors import DialogueError, StreamError
from openrlhf_gopo.rewards.custom import Rewards
from openrlhf_gopo.rewards.joint import score
from openrlhf_gopo.rollout.agent import Agent, Case, Policy
from openrlhf_gopo.rollout.gate import Gate
from openrlhf_gopo.threads import in_thread
from openrlhf_gopo.types import Goal, Outcome, StopReason, Trajectory, Turn

T = TypeVar("T")

BUILT_IN = Rewards()  # no reward beyond the built-in ones


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``max_turns``: None for the environment's limit of the goal. ``user_timeout``: seconds a call may take."""

    max_turns: int | None = None
    user_timeout: float = 60.0


def dialogue_seed(seed: int, goal: Goal, sample: int) -> int:
    """The user simulator's seed in dialogue ``sample`` about ``goal`` of a run with ``seed``."""
    return seed_of(f"{seed}:{goal.id}:{sample}")


def seed_of(key: str) -> int:
    """48 bits that depend on all of ``key``, the same in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


async def run_dialogue(
    env: Environment,
    goal: Goal,
    policy: Policy,
    limits: Limits,
    *,
    sample: int = 0,
    seed: int = 0,
    rewards: Rewards = BUILT_IN,
    gate: Gate | None = None,
) -> Trajectory:
    """Play ``goal`` to its end and score it. ``seed`` is the user simulator's; ``gate`` is passed at every turn.

    Returns:
        The trajectory, with the streams of the roles that are sampled. If the environment, a reward or the policy
        raised, timed out or broke its contract, or a text cannot be tokenised safely, the stop reason is FAILED,
        ``error`` holds the traceback, and the streams hold what was sampled so far. An engine's exception is not a
        dialogue's fault and propagates. When the responder has no room left (MAX_TOKENS), the last decision is one
        that no turn carried out.
    """
    run = _Run(env, goal, policy, limits, Trajectory(goal, sample, seed), gate or Gate())
    try:
        await run.play()
        scores = await run.call(lambda: score(run.trajectory))
        with run._blame():
            run.trajectory.rewards = scores | await rewards.score_further(run.trajectory)
    except (DialogueError, StreamError):
        run.trajectory.stop = StopReason.FAILED
        run.trajectory.error = traceback.format_exc()
    return run.trajectory


class _Run:
    """The state of one dialogue under way."""

    def __init__(
        self, env: Environment, goal: Goal, policy: Policy, limits: Limits, trajectory: Trajectory, gate: Gate
    ) -> None:
        self.env, self.goal, self.policy, self.limits = env, goal, policy, limits
        self.trajectory, self.gate = trajectory, gate

    async def play(self) -> None:
        agent = await self._open()
        dialogue, observation = self.dialogue, self.dialogue.opening
        for _ in range(self.limits.max_turns or self.env.turn_limit(self.goal)):
            turn = Turn(user=observation.user, allowed=observation.allowed, strategy="", reply="")
            relevance = await self.call(dialogue.relevance)
            with self._blame():
                turn.relevance = self._checked_relevance(relevance)
            async with self.gate:
                turn.version = self.gate.version
                played = await self._play_turn(agent, turn)
            if not played:
                self.trajectory.stop = StopReason.MAX_TOKENS
                return
            outcome = await self.call(partial(dialogue.step, turn.strategy, turn.reply))
            with self._blame():
                self._record(turn, outcome)
            if outcome.stop is not None:
                self.trajectory.stop = outcome.stop
                return
            assert outcome.next is not None  # _record checked it
            observation = outcome.next
        self.trajectory.stop = StopReason.MAX_TURNS

    async def _play_turn(self, agent: Agent, turn: Turn) -> bool:
        """The agent's side of ``turn``; False when a stream has no room for it."""
        past = self.trajectory.turns
        choice = await agent.expert.choose(past, turn)
        if choice is None:
            return False
        turn.strategy, turn.expert_logprob, turn.plan = choice.strategy, choice.logprob, choice.plan
        turn.invalid = choice.invalid
        turn.probabilities, turn.forced = choice.probabilities, len(turn.allowed) == 1
        turn.briefing = await self.call(partial(self.dialogue.briefing, turn.strategy))
        turn.expected = await self.call(partial(self.dialogue.expected, turn.strategy))
        reply = await agent.responder.write(past, turn)
        if reply is None:
            return False
        turn.reply, turn.reply_cut, turn.reply_group = reply.text, reply.cut, reply.group
        return True

    async def _open(self) -> Agent:
        catalogue = await self.call(lambda: list(self.env.catalogue(self.goal)))
        self.dialogue = await self.call(lambda: self.env.start(self.goal, self.trajectory.seed))
        with self._blame():
            self.strategies = {s.id for s in catalogue}
            self._check_allowed(self.dialogue.opening.allowed)
            self.trajectory.user = self.dialogue.user
            agent = self.policy.open(
                Case(self.goal, catalogue, self.dialogue, self.trajectory.sample, self.trajectory.seed)
            )
        self.trajectory.streams = dict(agent.streams)
        return agent

    async def call(self, fn: Callable[[], T]) -> T:
        """Call into the environment or a reward; whatever goes wrong there is a ``DialogueError``."""
        with self._blame():
            if not self.env.blocking:
                return fn()
            pending = asyncio.wrap_future(in_thread(fn, "gopo-env"))  # no engine's event loop waits
            try:
                return await asyncio.wait_for(pending, self.limits.user_timeout)
            except asyncio.TimeoutError as error:
                if pending.cancelled():  # not a TimeoutError of its own
                    raise DialogueError(f"no answer in --gopo.user_timeout {self.limits.user_timeout} s") from error
                raise

    @contextmanager
    def _blame(self) -> Iterator[None]:
        """Make whatever is raised inside a ``DialogueError`` of this environment and goal."""
        try:
            yield
        except Exception as error:
            what = str(error) if isinstance(error, DialogueError) else f"{type(error).__name__}: {error}"
            raise DialogueError(f"{self.env.name}, goal {self.goal.id}: {what}") from error

    def _record(self, turn: Turn, outcome: Outcome) -> None:
        """Check the environment's verdict, then keep it: a bad one must not become a reward."""
        strangers = [s for s in outcome.completed if s not in self.goal.subgoals]
        if strangers:
            raise DialogueError(f"completed unknown subgoals {strangers}")
        if not 0 <= outcome.engagement <= 1:
            raise DialogueError(f"engagement {outcome.engagement} not in [0, 1]")
        if (outcome.stop is None) == (outcome.next is None):
            raise DialogueError("an outcome has a stop reason or a next turn")
        if outcome.stop is StopReason.FAILED:
            raise DialogueError("the environment gave the dialogue up")
        if outcome.next is not None:
            self._check_allowed(outcome.next.allowed)
        # Into Python's own types: an environment that counts with numpy would leave what JSON cannot express.
        turn.events, turn.completed = tuple(map(str, outcome.events)), tuple(map(str, outcome.completed))
        turn.engagement, turn.on_task = float(outcome.engagement), bool(outcome.on_task)
        self.trajectory.turns.append(turn)

    def _check_allowed(self, allowed: tuple[str, ...]) -> None:
        strangers = [s for s in allowed if s not in self.strategies]
        if strangers or not allowed or len(set(allowed)) < len(allowed):
            raise DialogueError(f"allowed {allowed} is empty, has a strategy twice, or has unknown ones {strangers}")

    def _checked_relevance(self, relevance: Mapping[str, int]) -> dict[str, int]:
        bad = {s: grade for s, grade in relevance.items() if grade not in (0, 1, 2, 3)}
        if bad:
            raise DialogueError(f"relevance {bad} not in 0..3")
        return {strategy: int(grade) for strategy, grade in relevance.items()}
