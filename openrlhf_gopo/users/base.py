"""User simulators: the environment decides what a customer means, a simulator says it.

An environment keeps state, mood, subgoals and rewards to itself. Where its customer speaks it has a draft in its own
words, and asks the dialogue's ``Voice`` to word it. So whoever speaks, equal (goal, seed, strategies, replies) lead to
the same events; and nothing that a simulator writes can change what a turn achieved.

To add a simulator, subclass ``UserSimulator`` and pass ``--gopo.user path/to/file.py:ClassName``, or register the class
under the entry-point group ``openrlhf_gopo.users``. It is built without arguments, once per process.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openrlhf_gopo.errors import DialogueError

MAX_UTTERANCE = 2000  # characters; a longer utterance fails its dialogue


@dataclass(frozen=True)
class Cue:
    """All that the customer knows when they speak. Nothing here is hidden from them, and nothing else is passed.

    ``draft``: the environment's own wording. ``values``: strings that any other wording must hold too. ``acts``: the
    environment's names of what is meant. ``persona``: of the goal. ``told``: facts told so far, these included.
    ``heard``: the agent's last reply, "" in the opening. ``key``: names goal, dialogue seed and turn; the only source
    of chance.
    """

    draft: str
    values: tuple[str, ...] = ()
    acts: tuple[str, ...] = ()
    persona: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)
    heard: str = ""
    key: str = ""


class UserSimulator(ABC):
    """Words what customers mean; serves many dialogues, from several threads where it is ``blocking``.

    ``blocking``: True when ``say`` may wait (network, disk); the rollout then calls it from a thread.
    """

    blocking: ClassVar[bool] = True

    @abstractmethod
    def say(self, cue: Cue) -> str:
        """One utterance of at most ``MAX_UTTERANCE`` characters. Equal cues give equal words.

        Raises:
            DialogueError: no words could be had; this dialogue fails.
        """


class AsDrafted(UserSimulator):
    """The environment's own simulator: its draft is what is said."""

    blocking = False

    def say(self, cue: Cue) -> str:
        return cue.draft


class Voice:
    """How the customer of one dialogue speaks. ``name``: the simulator's, as given to --gopo.user."""

    def __init__(self, name: str | None, simulator: UserSimulator, persona: Mapping[str, Any], key: str) -> None:
        self.name, self._simulator, self._persona, self._key = name, simulator, persona, key
        self._turn = 0

    def say(
        self,
        draft: str,
        *,
        values: Iterable[str] = (),
        acts: Iterable[str] = (),
        told: Mapping[str, str] | None = None,
        heard: str = "",
    ) -> str:
        """The next utterance; see ``Cue`` for the arguments.

        Raises:
            DialogueError: no text, an empty one, or one beyond ``MAX_UTTERANCE``; or the simulator's own.
        """
        key = f"{self._key}/{self._turn}"
        self._turn += 1
        values = tuple(dict.fromkeys(values))
        said = self._simulator.say(Cue(draft, values, tuple(acts), self._persona, told or {}, heard, key))
        if not isinstance(said, str) or not said.strip():
            raise DialogueError(f"--gopo.user {self.name}: said {said!r:.80}; an utterance is a non-empty string")
        if len(said) > MAX_UTTERANCE:
            raise DialogueError(
                f"--gopo.user {self.name}: an utterance of {len(said)} characters; at most {MAX_UTTERANCE} "
                f"(users.base.MAX_UTTERANCE) are allowed: {said[:60]!r}..."
            )
        return said


@dataclass(frozen=True)
class Share:
    """One simulator of a mixture and its weight, a positive number."""

    name: str | None
    simulator: UserSimulator
    weight: float = 1.0


class Users:
    """The simulators of a run. Each dialogue draws one, with a probability proportional to its weight."""

    def __init__(self, shares: Sequence[Share]) -> None:
        assert all(0 < share.weight < math.inf for share in shares)  # parse_mixture saw to it
        self.shares = tuple(shares)

    @property
    def blocking(self) -> bool:
        """True when any of them may wait."""
        return any(share.simulator.blocking for share in self.shares)

    def draw(self, persona: Mapping[str, Any], key: str) -> Voice:
        """The voice of the dialogue ``key`` (goal and seed)."""
        weights = [share.weight for share in self.shares]
        share = random.Random(f"user/{key}").choices(self.shares, weights)[0]
        return Voice(share.name, share.simulator, persona, key)
