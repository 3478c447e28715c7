"""The environment protocol: who knows what.

An ``Environment`` holds data that many dialogues share (catalogues, goals, databases) and is loaded once per process.
A ``Dialogue`` is one single-use conversation about one goal. It knows everything; the agent sees only what
``Observation`` and ``briefing`` give it. ``relevance`` and ``reference_reply`` look at the hidden goal: they grade and
demonstrate, and never reach the agent.

To add an environment, subclass both and pass ``--gopo.env path/to/file.py:ClassName``, or register the class under the
entry-point group ``openrlhf_gopo.envs``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.sop import Procedure
from openrlhf_gopo.types import Goal, Observation, Outcome, Strategy
from openrlhf_gopo.users.base import AsDrafted, Share, Users, Voice

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class HumanTurn:
    """One turn of a human agent: the user's words before it, its strategy ("" when unknown), and the agent's words.

    ``events``: what else the log records of it (a system message, a result).
    """

    user: str
    strategy: str
    reply: str
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class HumanDialogue:
    """One human dialogue as its reader yields it: the turns, and ``last``, the user's words after the last one.

    ``goal``: what the data set says of the user's goal, in its own keys.
    """

    id: str
    goal: Mapping[str, Any]
    turns: tuple[HumanTurn, ...]
    last: str = ""


class Dialogue(ABC):
    """One conversation: read ``opening``, then alternate ``briefing`` and ``step`` until an outcome stops it.

    ``user``: name of the user simulator, for slices; None where there is no choice of one.
    """

    opening: Observation
    user: str | None = None

    @abstractmethod
    def briefing(self, strategy: str) -> str:
        """What the responder is told when ``strategy`` is chosen now: tool results and facts it may state."""

    @abstractmethod
    def expected(self, strategy: str) -> tuple[str, ...]:
        """Strings (ids, prices, names) that a faithful reply under ``strategy`` contains now; () when none."""

    @abstractmethod
    def step(self, strategy: str, reply: str) -> Outcome:
        """Play one turn. ``strategy`` is in the current allowed set.

        Raises:
            SopError: ``strategy`` is not allowed now.
            DialogueError: the dialogue already ended.
        """

    @abstractmethod
    def relevance(self) -> Mapping[str, int]:
        """Grade 0..3 of every currently allowed strategy for the hidden goal (ESNDCG's rel)."""

    @abstractmethod
    def reference_reply(self, strategy: str) -> str:
        """A good reply under ``strategy`` now, from templates or human logs; behaviour cloning and chrF/BLEU use it."""


class Environment(ABC):
    """Catalogue + SOP + goals + user simulator + success rule.

    ``blocking``: True when a dialogue's methods may wait (network, disk); the rollout then calls them from a thread.
    ``own_user``: name of the own user simulator, where dialogues speak through ``voice``; None where --gopo.user cannot
    exchange it. ``users``: the simulators of --gopo.user. ``procedure``: the SOP with its catalogue, where one holds
    for all goals.
    """

    name: ClassVar[str]
    blocking: bool = True
    max_turns: int = 16
    own_user: ClassVar[str | None] = None
    users: Users | None = None
    procedure: ClassVar[Procedure | None] = None

    @classmethod
    def load(cls, data: str | None) -> Environment:
        """Build from ``--gopo.data``: a path or whatever the environment takes there; None when it is left out.

        Raises:
            ConfigError: here, where ``load`` is not overridden: data was given.
            DataError: the data is missing or malformed; names path, file, line and field.
        """
        if data is not None:
            raise ConfigError(f"--gopo.data {data}: the environment {cls.name} reads no data; leave the flag out")
        return cls()

    @abstractmethod
    def goals(self, split: str) -> Sequence[Goal]:
        """The goals of ``"train"`` or ``"heldout"``, in a fixed order. No goal is in both."""

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """The strategies the expert chooses from in a dialogue about ``goal``, in a fixed order: the procedure's."""
        if self.procedure is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a procedure nor a catalogue of its own")
        return self.procedure.strategies

    def catalogue_size(self) -> int:
        """Strategies in the largest catalogue of any goal: as many labels are needed."""
        return max(len(self.catalogue(goal)) for split in SPLITS for goal in self.goals(split))

    def procedures(self) -> Mapping[str, Procedure]:
        """The SOPs by name, with their catalogues, for the command ``cli.sop``; {}: none shown."""
        return {self.name: self.procedure} if self.procedure else {}

    def turn_limit(self, goal: Goal) -> int:
        """Turns after which a dialogue about ``goal`` is truncated, unless --gopo.max_turns says otherwise."""
        return self.max_turns

    @abstractmethod
    def start(self, goal: Goal, seed: int) -> Dialogue:
        """A fresh dialogue. Equal (goal, seed, strategies, replies) give equal transcripts."""

    def human(self, goal: Goal) -> Sequence[HumanTurn]:
        """The human dialogue that ``goal`` was made from, as turns; () where there is none."""
        return ()

    def voice(self, goal: Goal, seed: int) -> Voice:
        """How the customer of the dialogue (goal, seed) speaks; ``start`` hands it to the dialogue."""
        users = self.users or Users([Share(self.own_user, AsDrafted())])
        return users.draw(goal.persona, f"{goal.id}/{seed}")
