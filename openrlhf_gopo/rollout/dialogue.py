"""One dialogue, from the first utterance to its stop reason. Knows neither vLLM nor Ray."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import DialogueError, StreamError
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.two_level import StreamBuilder, TwoLevelPolicy
from openrlhf_gopo.rewards.custom import Rewards
from openrlhf_gopo.rewards.joint import score
from openrlhf_gopo.rollout.engine import Generate, Sampling
from openrlhf_gopo.types import Goal, Outcome, StopReason, Strategy, Trajectory, Turn

T = TypeVar("T")

# Environments that may block run here, one thread per waiting dialogue, so that no engine's event loop waits.
_THREADS = ThreadPoolExecutor(max_workers=256, thread_name_prefix="gopo-env")


BUILT_IN = Rewards()  # no reward beyond the built-in ones


@dataclass(frozen=True)
class Limits:
    """``max_len``: tokens of one stream. ``max_turns``: None for the environment's limit of the goal.

    ``reply_max_tokens``: cap of one reply. ``user_timeout``: seconds a call.
    """

    max_len: int
    max_turns: int | None
    reply_max_tokens: int
    user_timeout: float
    expert_temperature: float = 1.0
    responder_temperature: float = 1.0
    responder_top_p: float = 1.0


async def run_dialogue(
    env: Environment,
    goal: Goal,
    policy: TwoLevelPolicy,
    generate: dict[str, Generate],
    limits: Limits,
    *,
    sample: int = 0,
    seed: int = 0,
    rewards: Rewards = BUILT_IN,
) -> Trajectory:
    """Play ``goal`` to its end and score it.

    Returns:
        The trajectory, with the stream of each role. If the environment or a reward raised, timed out or broke its
        contract, or a text cannot be tokenised safely, the stop reason is FAILED, ``error`` holds the traceback, and
        the streams hold what was sampled so far. An engine's exception is not a dialogue's fault and propagates. When
        the responder has no room left (MAX_TOKENS), the last decision is one that no turn carried out.
    """
    run = _Run(env, goal, policy, generate, limits, sample, seed)
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
        self,
        env: Environment,
        goal: Goal,
        policy: TwoLevelPolicy,
        generate: dict[str, Generate],
        limits: Limits,
        sample: int,
        seed: int,
    ) -> None:
        self.env, self.goal, self.policy, self.generate, self.limits = env, goal, policy, generate, limits
        self.trajectory = Trajectory(goal, sample, seed)

    async def play(self) -> None:
        await self._open()
        dialogue = await self.call(lambda: self.env.start(self.goal, self.trajectory.seed))
        with self._blame():
            self.trajectory.user, observation = dialogue.user, dialogue.opening
            turns = self.limits.max_turns or self.env.turn_limit(self.goal)
            self._check_allowed(observation.allowed)
        reply: str | None = None
        for _ in range(turns):
            asked = self.expert.message(self.policy.decision_text(reply, observation.user))
            if self._full(self.expert, asked, 1 + self.policy.room_to_plan()):
                self.trajectory.stop = StopReason.MAX_TOKENS
                return
            turn = Turn(user=observation.user, allowed=observation.allowed, strategy="", reply="")
            turn.relevance = await self.call(dialogue.relevance)
            with self._blame():
                self._check_relevance(turn.relevance)
            await self._decide(turn, asked)
            if not await self._reply(turn, dialogue):
                self.trajectory.stop = StopReason.MAX_TOKENS
                return
            outcome = await self.call(partial(dialogue.step, turn.strategy, turn.reply))
            with self._blame():
                self._record(turn, outcome)
            if outcome.stop is not None:
                self.trajectory.stop = outcome.stop
                return
            assert outcome.next is not None  # _record checked it
            observation, reply = outcome.next, turn.reply
        self.trajectory.stop = StopReason.MAX_TURNS

    async def _open(self) -> None:
        catalogue = await self.call(lambda: list(self.env.catalogue(self.goal)))
        with self._blame():
            self.catalogue: dict[str, Strategy] = {s.id: s for s in catalogue}
            self.label_ids = self.policy.label_ids(catalogue)
            self.expert, self.responder = self.policy.streams(self.goal, catalogue)
        builders = {EXPERT: self.expert, RESPONDER: self.responder}
        self.trajectory.streams = {role: builders[role].stream for role in self.policy.roles}

    async def call(self, fn: Callable[[], T]) -> T:
        """Call into the environment or a reward; whatever goes wrong there is a ``DialogueError``."""
        with self._blame():
            if not self.env.blocking:
                return fn()
            pending = asyncio.get_running_loop().run_in_executor(_THREADS, fn)
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

    async def _decide(self, turn: Turn, asked: list[int]) -> None:
        self.expert.ask(asked)
        ids = [self.label_ids[s] for s in turn.allowed]
        if len(ids) == 1:
            turn.strategy, turn.forced = turn.allowed[0], True
            self.expert.force(ids[0])
            return
        if self.policy.plan_tokens:
            stop = self.expert.template.stop_token
            sampling = Sampling(self.policy.plan_tokens, self.limits.expert_temperature, stop_token=stop)
            plan = await self.generate[EXPERT](self.expert.stream.tokens, sampling)
            self.expert.act(plan.tokens, plan.logprobs)
            turn.plan = self.expert.template.decode(plan.tokens)
            self.expert.ask(self.expert.message(prompts.LABEL_QUESTION))
        sampling = Sampling(max_tokens=1, temperature=self.limits.expert_temperature, allowed=tuple(ids))
        chosen = await self.generate[EXPERT](self.expert.stream.tokens, sampling)
        self.expert.act(chosen.tokens, chosen.logprobs, ids)
        turn.strategy = turn.allowed[ids.index(chosen.tokens[0])]
        turn.expert_logprob = chosen.logprobs[0]

    async def _reply(self, turn: Turn, dialogue: Dialogue) -> bool:
        """Write the reply; False when the responder's stream has no room for it."""
        turn.briefing = await self.call(lambda: dialogue.briefing(turn.strategy))
        turn.expected = await self.call(lambda: dialogue.expected(turn.strategy))
        strategy = self.catalogue[turn.strategy]
        asked = self.responder.message(self.policy.reply_text(turn.user, strategy, turn.briefing))
        cap = self.limits.reply_max_tokens
        if self._full(self.responder, asked, cap):
            return False
        self.responder.ask(asked)
        stop = self.responder.template.stop_token
        sampling = Sampling(cap, self.limits.responder_temperature, self.limits.responder_top_p, stop)
        written = await self.generate[RESPONDER](self.responder.stream.tokens, sampling)
        self.responder.act(written.tokens, written.logprobs)
        turn.reply = self.responder.template.decode(written.tokens)
        turn.reply_cut = len(written.tokens) == cap and written.tokens[-1] != stop
        return True

    def _full(self, builder: StreamBuilder, asked: list[int], cap: int) -> bool:
        return len(builder.stream.tokens) + len(asked) + cap > self.limits.max_len

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
        turn.events, turn.completed = outcome.events, outcome.completed
        turn.engagement, turn.on_task = outcome.engagement, outcome.on_task
        self.trajectory.turns.append(turn)

    def _check_allowed(self, allowed: tuple[str, ...]) -> None:
        strangers = [s for s in allowed if s not in self.label_ids]
        if strangers or not allowed or len(set(allowed)) < len(allowed):
            raise DialogueError(f"allowed {allowed} is empty, has a strategy twice, or has unknown ones {strangers}")

    def _check_relevance(self, relevance: Mapping[str, int]) -> None:
        bad = {s: grade for s, grade in relevance.items() if not 0 <= grade <= 3}
        if bad:
            raise DialogueError(f"relevance {bad} not in 0..3")
