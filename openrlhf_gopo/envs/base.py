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

from openrlhf_gopo.types import Goal, Observation, Outcome, Strategy

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
    """One conversation: read ``opening``, then alternate ``briefing`` and ``step`` until an outcome stops it."""

    opening: Observation

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
    """

    name: ClassVar[str]
    blocking: ClassVar[bool] = True
    max_turns: int = 16

    @classmethod
    @abstractmethod
    def load(cls, data: str | None) -> Environment:
        """Build from ``--gopo.data`` (a path, or None).

        Raises:
            DataError: the data is missing or malformed; names path, file, line and field.
        """

    @abstractmethod
    def goals(self, split: str) -> Sequence[Goal]:
        """The goals of ``"train"`` or ``"heldout"``, in a fixed order. No goal is in both."""

    @abstractmethod
    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """The strategies the expert chooses from in a dialogue about ``goal``, in a fixed order."""

    def catalogue_size(self) -> int:
        """Strategies in the largest catalogue of any goal: as many labels are needed."""
        return max(len(self.catalogue(goal)) for split in SPLITS for goal in self.goals(split))

    @abstractmethod
    def start(self, goal: Goal, seed: int) -> Dialogue:
        """A fresh dialogue. Equal (goal, seed, strategies, replies) give equal transcripts."""

    def human(self, goal: Goal) -> Sequence[HumanTurn]:
        """The human dialogue that ``goal`` was made from, as turns; () where there is none."""
        return ()
