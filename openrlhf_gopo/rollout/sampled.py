"""Agents whose two roles are token streams, continued by an inference engine: what training rolls out."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.two_level import StreamBuilder, TwoLevelPolicy
from openrlhf_gopo.rewards.joint import joint
from openrlhf_gopo.rewards.response import candidate_scores
from openrlhf_gopo.rollout.agent import Advice, Agent, Case, Choice, Reply
from openrlhf_gopo.rollout.dialogue import Limits, seed_of
from openrlhf_gopo.rollout.engine import Generate, Sampling
from openrlhf_gopo.types import Strategy, Turn


@dataclass(frozen=True)
class ReplyGroup:
    """``size`` replies are drawn at every turn, one of them is said. ``weights``: of the metrics that score each."""

    size: int
    weights: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TokenLimits(Limits):
    """``max_len``: tokens of one stream. ``reply_max_tokens``: cap of one reply.

    ``probabilities``: ask the engine for those of all allowed labels, for a reader of the dialogues.
    ``reply_group``: None to draw the reply that is said and no other.
    """

    max_len: int
    reply_max_tokens: int
    expert_temperature: float = 1.0
    responder_temperature: float = 1.0
    responder_top_p: float = 1.0
    probabilities: bool = False
    reply_group: ReplyGroup | None = None


@dataclass(frozen=True)
class SampledPolicy:
    """``policy`` says which tokens are asked; ``generate`` (by role) samples them.

    ``advice``: what the expert reads first, once, in the first turn that it decides: it stays in its stream, as all
    that was asked.
    An engine's exception is not a dialogue's fault: it is no ``DialogueError`` and ends the rollout.
    """

    policy: TwoLevelPolicy
    generate: Mapping[str, Generate]
    limits: TokenLimits
    advice: Advice | None = None

    def open(self, case: Case) -> Agent:
        """Fresh streams, opened by what the policy tells each role."""
        deciding, writing = self.policy.streams(case.goal, case.catalogue)
        builders = {EXPERT: deciding, RESPONDER: writing}
        return Agent(
            _Expert(self, case, deciding, self.policy.label_ids(case.catalogue)),
            _Responder(self, case, writing, {s.id: s for s in case.catalogue}),
            {role: builders[role].stream for role in self.policy.roles},
        )


def _full(builder: StreamBuilder, asked: list[int], cap: int, limits: TokenLimits) -> bool:
    return len(builder.stream.tokens) + len(asked) + cap > limits.max_len


@dataclass(frozen=True)
class _Expert:
    sampled: SampledPolicy
    case: Case
    stream: StreamBuilder
    label_ids: Mapping[str, int]

    async def choose(self, past: Sequence[Turn], turn: Turn) -> Choice | None:
        policy, limits = self.sampled.policy, self.sampled.limits
        text = policy.decision_text(past[-1].reply if past else None, turn.user)
        if self.sampled.advice and len(turn.allowed) > 1 and all(before.forced for before in past):
            text = "\n".join(filter(None, (self.sampled.advice(self.case, past, turn), text)))
        asked = self.stream.message(text)
        if _full(self.stream, asked, 1 + policy.room_to_plan(), limits):
            return None
        self.stream.ask(asked)
        ids = [self.label_ids[s] for s in turn.allowed]
        if len(ids) == 1:
            self.stream.force(ids[0])
            return Choice(turn.allowed[0])
        plan = await self._plan() if policy.plan_tokens else ""
        sampling = Sampling(1, limits.expert_temperature, allowed=tuple(ids), probabilities=limits.probabilities)
        [chosen] = await self.sampled.generate[EXPERT](self.stream.stream.tokens, sampling)
        self.stream.act(chosen.tokens, chosen.logprobs, ids)
        chances = zip(turn.allowed, map(math.exp, chosen.allowed_logprobs), strict=True) if limits.probabilities else ()
        return Choice(turn.allowed[ids.index(chosen.tokens[0])], chosen.logprobs[0], dict(chances), plan)

    async def _plan(self) -> str:
        policy, limits = self.sampled.policy, self.sampled.limits
        template = self.stream.template
        sampling = Sampling(policy.plan_tokens, limits.expert_temperature, stop_token=template.stop_token)
        [plan] = await self.sampled.generate[EXPERT](self.stream.stream.tokens, sampling)
        self.stream.act(plan.tokens, plan.logprobs)
        self.stream.ask(self.stream.message(prompts.LABEL_QUESTION))
        return template.decode(plan.tokens)


@dataclass(frozen=True)
class _Responder:
    sampled: SampledPolicy
    case: Case
    stream: StreamBuilder
    strategies: Mapping[str, Strategy]

    async def write(self, past: Sequence[Turn], turn: Turn) -> Reply | None:
        limits, cap = self.sampled.limits, self.sampled.limits.reply_max_tokens
        order = self.sampled.policy.reply_text(turn.user, self.strategies[turn.strategy], turn.briefing)
        asked = self.stream.message(order)
        if _full(self.stream, asked, cap, limits):
            return None
        self.stream.ask(asked)
        template, group = self.stream.template, limits.reply_group
        sampling = Sampling(
            cap,
            limits.responder_temperature,
            limits.responder_top_p,
            template.stop_token,
            n=group.size if group else 1,
        )
        drawn = await self.sampled.generate[RESPONDER](self.stream.stream.tokens, sampling)
        texts = [template.decode(one.tokens) for one in drawn]
        said, scores = self._said(past, turn, texts, group) if group else (0, ())
        written = drawn[said]
        self.stream.act(written.tokens, written.logprobs)
        cut = len(written.tokens) == cap and written.tokens[-1] != template.stop_token
        return Reply(texts[said], cut, scores)

    def _said(
        self, past: Sequence[Turn], turn: Turn, texts: Sequence[str], group: ReplyGroup
    ) -> tuple[int, tuple[float, ...]]:
        """Which of ``texts`` is said, and the scores of all, its own first.

        It is drawn whatever they say: else the others' scores would depend on it, and were no baseline.
        """
        chance = random.Random(seed_of(f"{self.case.seed}:{self.case.sample}:reply:{len(past)}"))
        said = chance.randrange(len(texts))
        found = candidate_scores(self.case.goal.context, past, turn, texts)
        scores = [joint(of_one, group.weights) for of_one in found]
        return said, (scores.pop(said), *scores)
