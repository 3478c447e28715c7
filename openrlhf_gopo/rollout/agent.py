"""Who plays the agent's side: an expert that picks each turn's strategy, a responder that words its reply.

What a policy is made of does not matter to the dialogue: sampled token streams (``rollout.sampled``), a script, a case
memory or a remote model (``evaluation``). The two halves of an agent may come from different policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs.base import Dialogue
from openrlhf_gopo.types import Goal, Strategy, Stream, Turn


@dataclass(frozen=True)
class Case:
    """One dialogue that opens. A fair agent reads ``goal.context`` and ``catalogue``; only scripts look further."""

    goal: Goal
    catalogue: Sequence[Strategy]
    dialogue: Dialogue
    sample: int
    seed: int


Advice = Callable[[Case, Sequence[Turn], Turn], str]
"""What an expert reads before it decides (dialogue, past turns, the turn to decide); "" for nothing.

Of one dialogue it is the same text at every turn: an expert that remembers reads it once.
"""


@dataclass(frozen=True)
class Choice:
    """A strategy of the allowed set, its log-probability (0 when forced or unknown), and those of the whole set.

    ``probabilities``: strategy id -> probability over the allowed set, empty when unknown. ``plan``: what the
    expert wrote before. ``invalid``: see ``Turn``.
    """

    strategy: str
    logprob: float = 0.0
    probabilities: Mapping[str, float] = field(default_factory=dict)
    plan: str = ""
    invalid: bool | None = None


@dataclass(frozen=True)
class Reply:
    """``cut``: the text ends at its token cap. ``group``: see ``Turn.reply_group``."""

    text: str
    cut: bool = False
    group: tuple[float, ...] = ()


class Expert(Protocol):
    """The expert of one dialogue."""

    async def choose(self, past: Sequence[Turn], turn: Turn) -> Choice | None:
        """The strategy of ``turn`` (its ``user`` and ``allowed`` are set); None when there is no room to decide.

        Raises:
            DialogueError, StreamError: this dialogue cannot go on; others can.
        """


class Responder(Protocol):
    """The responder of one dialogue."""

    async def write(self, past: Sequence[Turn], turn: Turn) -> Reply | None:
        """The reply of ``turn`` (``strategy`` and ``briefing`` are set); None when there is no room for it.

        Raises:
            DialogueError, StreamError: this dialogue cannot go on; others can.
        """


@dataclass(frozen=True)
class Agent:
    """Both halves in one dialogue. ``streams``: the tokens of the roles that are sampled here, growing as it goes."""

    expert: Expert
    responder: Responder
    streams: Mapping[str, Stream] = field(default_factory=dict)


class Policy(Protocol):
    """Opens an agent for every dialogue; shared by dialogues that are under way at the same time."""

    def open(self, case: Case) -> Agent:
        """The agent of one dialogue."""


@dataclass(frozen=True)
class Halves:
    """The expert of one policy with the responder of another."""

    expert: Policy
    responder: Policy

    def open(self, case: Case) -> Agent:
        """Of the streams, those that these halves grow."""
        deciding, writing = self.expert.open(case), self.responder.open(case)
        halves = ((deciding, EXPERT), (writing, RESPONDER))
        streams = {role: agent.streams[role] for agent, role in halves if role in agent.streams}
        return Agent(deciding.expert, writing.responder, streams)
