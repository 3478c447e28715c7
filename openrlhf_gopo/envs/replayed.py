"""The play of a conversation whose user is a replay of humans: what the environments on human data have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection

from openrlhf_gopo.envs.base import Dialogue
from openrlhf_gopo.envs.reading import CLEAR
from openrlhf_gopo.errors import DialogueError, SopError
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason
from openrlhf_gopo.users.base import Voice
from openrlhf_gopo.users.replay import Answer, ReplayUser

BYE = "goodbye"
PATIENCE = 3  # off-task turns in a row after which the user leaves
# The user's reaction as engagement, by the source of their words; off task they have less to say.
ENGAGEMENT = {"own": 1.0, "value": 1.0, "pool": 0.8, "generic": 0.8}
OFF_TASK = {"own": 0.4, "value": 0.4, "pool": 0.3, "generic": 0.1}


class ReplayDialogue(Dialogue):
    """Judges each turn and keeps the state they all need. Single use; a subclass sets ``opening``.

    State: the strategies so far, the slots the user ``told``, the user's latest ``words``, the subgoals completed, the
    off-task turns in a row. ``voice`` may word the replayed answers anew; what they tell stays.
    A subgoal ``slot:X`` is completed when the user tells X; ``close:goodbye`` by a goodbye that was due.
    """

    def __init__(self, goal: Goal, user: ReplayUser, told: Collection[str], words: str, voice: Voice) -> None:
        self._goal, self._user, self._told, self._words = goal, user, set(told), words
        self.user, self._voice = voice.name, voice
        self._history: list[str] = []
        self._completed: set[str] = set()
        self._new: set[str] = set()  # slots told in the latest answer for the first time
        self._off_task = 0
        self._over = False

    @abstractmethod
    def _allowed(self) -> tuple[str, ...]:
        """What the SOP allows now, in catalogue order."""

    @abstractmethod
    def _required(self) -> set[str]:
        """The steps that the goal needs now; each is allowed."""

    @abstractmethod
    def _play(self, strategy: str) -> tuple[Answer, list[str], list[str]]:
        """The user's answer, the subgoals completed (slots apart), and the events."""

    def _understood(self, strategy: str, reply: str) -> bool:
        """Whether the user gets from ``reply`` what ``strategy`` is to tell."""
        return True

    def _follow(self, answer: Answer) -> Answer:
        """``answer``, extended by what the user wants next once its turn is accounted for."""
        return answer

    def step(self, strategy: str, reply: str) -> Outcome:
        """Play one turn. A reply without a word, or not understood, gets a complaint and does nothing else."""
        if self._over:
            raise DialogueError(f"goal {self._goal.id}: the dialogue is over; start a new one")
        allowed = self._allowed()
        if strategy not in allowed:
            raise SopError(f"goal {self._goal.id}: {strategy!r} is not allowed now; allowed: {', '.join(allowed)}")
        heard = re.search(r"\w", reply) is not None and self._understood(strategy, reply)
        on_task = strategy in self._required() and heard
        if strategy == BYE:
            return self._close(on_task)
        answer, completed, events = self._play(strategy) if heard else (self._user.complain(), [], ["reply:unclear"])
        if heard:  # what was not said may be said again
            self._history.append(strategy)
        self._new = set(answer.tells - self._told)
        self._told |= self._new
        completed += [f"slot:{slot}" for slot in sorted(answer.tells) if f"slot:{slot}" in self._goal.subgoals]
        completed = [name for name in dict.fromkeys(completed) if name not in self._completed]
        self._completed.update(completed)
        answer = self._follow(answer) if heard else answer
        self._told |= answer.tells
        self._words = answer.text
        return self._react(answer, reply, events, completed, on_task or bool(completed))

    def _close(self, on_task: bool) -> Outcome:
        self._over = True
        completed = (f"close:{BYE}",) if on_task and f"close:{BYE}" in self._goal.subgoals else ()
        self._completed.update(completed)
        done = self._completed == set(self._goal.subgoals)
        return Outcome(
            events=("agent:goodbye",),
            completed=completed,
            engagement=1.0 if on_task else 0.0,
            on_task=on_task,
            stop=StopReason.COMPLETED if done else StopReason.CLOSED,
        )

    def _react(self, answer: Answer, reply: str, events: list[str], completed: list[str], on_task: bool) -> Outcome:
        self._off_task = 0 if on_task else self._off_task + 1
        if self._off_task >= self._goal.persona["patience"]:
            self._over = True
            return Outcome(events=(*events, "user:left"), completed=tuple(completed), stop=StopReason.USER_LEFT)
        return Outcome(
            events=(*events, f"user:{answer.source}"),
            completed=tuple(completed),
            engagement=(ENGAGEMENT if on_task else OFF_TASK)[answer.source],
            on_task=on_task,
            next=self._observe(answer, reply),
        )

    def _observe(self, answer: Answer, heard: str = "") -> Observation:
        """The replayed words, or another simulator's wording of them that keeps this goal's values."""
        told = {slot: value for slot, value in self._goal.facts.items() if slot in self._told}
        acts = [f"tell {slot}" for slot in sorted(answer.tells)] or ["answer"]
        said = self._voice.say(answer.text, values=self._stated(answer.text), acts=acts, told=told, heard=heard)
        return Observation(said, self._allowed())

    def _stated(self, text: str) -> list[str]:
        """The goal's values that ``text`` states."""
        return [v for v in self._goal.facts.values() if v.casefold() not in CLEAR and mentions(text, v)]
