"""The data that flows through the project: goals -> turns -> trajectories. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any


class StopReason(str, Enum):
    """Why a dialogue ended. Exactly one applies."""

    COMPLETED = "completed"  # every subgoal is done
    CLOSED = "closed"  # the agent ended the dialogue with subgoals open
    USER_LEFT = "user_left"  # the user gave up
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # a stream has no room for one more turn
    FAILED = "failed"  # environment, user simulator or reward raised: quarantined, never trained on

    @property
    def truncated(self) -> bool:
        """True when the rollout's own limits, not a party of the dialogue, ended it."""
        return self in (StopReason.MAX_TURNS, StopReason.MAX_TOKENS)


@dataclass(frozen=True)
class Strategy:
    """One entry of a catalogue: what the expert chooses from.

    ``asks``/``gives``/``does`` name the facts it requests from the user, the facts it tells them, and the actions it
    performs; environments and SOPs give these names their meaning.
    """

    id: str
    name: str
    description: str
    asks: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    does: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What one user wants. The agent sees ``context`` and nothing else of it.

    ``subgoals`` maps a subgoal's id to its weight; the weights sum to 1. ``facts`` is what the user knows and may tell;
    ``persona`` steers the user simulator; ``data`` is private to the environment.
    """

    id: str
    intent: str
    context: str
    subgoals: Mapping[str, float]
    facts: Mapping[str, str] = field(default_factory=dict)
    persona: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"


@dataclass(frozen=True)
class Observation:
    """What the agent sees at the start of a turn: the utterance, and what the SOP allows (never empty)."""

    user: str
    allowed: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What one turn (strategy + reply) did, judged by the environment.

    ``completed``: subgoals this turn completed. ``engagement`` in [0, 1]: the user's reaction. ``on_task``: the turn
    completed a subgoal or was a step the SOP still required. Exactly one of ``stop`` and ``next`` is set.
    """

    events: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    engagement: float = 0.0
    on_task: bool = False
    stop: StopReason | None = None
    next: Observation | None = None


@dataclass
class Turn:
    """One turn: user utterance -> strategy -> reply, with what the environment said about it.

    ``relevance`` grades each allowed strategy 0..3 before the choice; ``briefing`` is what the responder was told;
    ``expected`` are the strings a faithful reply contains. ``probabilities`` is the expert's pi_E(z | h_t) over the
    allowed set, empty when unknown. ``expert_logprob`` is the sampler's log pi_E(z_t), 0 when forced (one allowed
    strategy). ``reply_cut`` is True when the reply hit its token cap. ``plan`` is what the expert wrote before it
    chose, if it plans. ``invalid``: the expert named no allowed strategy and one was drawn for it; None where that
    cannot happen (decoding is restricted to the allowed set, or there was nothing to choose).
    ``version``: updates that the weights which played it had had. ``reply_group``: the scores of the replies that were
    drawn for it (--gopo.reply_group), that of ``reply`` first; empty where one reply was drawn.
    """

    user: str
    allowed: tuple[str, ...]
    strategy: str
    reply: str
    briefing: str = ""
    expected: tuple[str, ...] = ()
    relevance: Mapping[str, int] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    engagement: float = 0.0
    on_task: bool = False
    expert_logprob: float = 0.0
    forced: bool = False
    reply_cut: bool = False
    plan: str = ""
    invalid: bool | None = None
    version: int = 0
    reply_group: tuple[float, ...] = ()


@dataclass
class Stream:
    """The append-only token sequence of one role in one dialogue.

    ``spans``: half-open [start, end) ranges of ``tokens`` that the role sampled, in order. ``logprobs``: the sampler's
    log-probability of each token of ``tokens``, 0.0 outside the spans. ``allowed``: per span, the label token ids that
    it could be, or nothing where the whole vocabulary was open.
    """

    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    allowed: list[list[int]] = field(default_factory=list)


@dataclass
class Trajectory:
    """One dialogue to its end. ``streams`` is keyed by role, ``rewards`` by metric name (``tse`` in [0, 100]).

    ``user`` names the user simulator, where the environment tells.
    """

    goal: Goal
    sample: int
    seed: int
    turns: list[Turn] = field(default_factory=list)
    stop: StopReason = StopReason.FAILED
    streams: dict[str, Stream] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    user: str | None = None

    @property
    def completed(self) -> tuple[str, ...]:
        """Subgoals completed, in order, each once."""
        return tuple(dict.fromkeys(s for turn in self.turns for s in turn.completed))

    @property
    def cause(self) -> str:
        """What made it fail: the last line of ``error``; "" if it did not."""
        return (self.error or "").strip().rpartition("\n")[2]

    @property
    def success(self) -> bool:
        """True when every subgoal was completed."""
        return set(self.completed) == set(self.goal.subgoals)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready record; the goal's private ``data`` stays out, the streams stay in, as the very lists."""
        record = asdict(replace(self, goal=replace(self.goal, data={}), streams={}))
        # asdict copies token by token, which takes ten times as long as all the rest of the record.
        record["streams"] = {role: dict(vars(stream)) for role, stream in self.streams.items()}
        record["goal"].pop("data")
        for turn in record["turns"]:
            if not turn["reply_group"]:
                del turn["reply_group"]
        record["stop"] = self.stop.value
        record["success"] = self.success
        return record
