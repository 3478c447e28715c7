"""A user simulator that replays what humans said. It sees the goal's own dialogue and a pool of others; never replies.

Where an answer comes from, in this order: the words of this goal's own dialogue; the words another user of the same
task said after the same strategy, with this goal's values in place of theirs; the bare value that was asked for; a
generic human reaction. All are verbatim human text up to the substituted values. Chance enters only through the pool.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ACKNOWLEDGE = re.compile(
    r"(?:(?:ok|okay|sure|alright|all right|great|perfect|cool|fine|thanks?|thank you)[\s,.!]*){1,2}", re.I
)
CLOSING = re.compile(r"(?:no|nope|nah|that'?s (?:all|it)|that is (?:all|it)|thanks?|thank you|(?:good)?bye)\b.*", re.I)
COMPLAINT = re.compile(
    r"what\?+|huh\?+|sorry\?+|i'?m sorry,? i don'?t understand\.?|i don'?t understand\.?|wait what\?.*"
    r"|.*\bi(?:'ve)? already (?:said|told|gave)\b.*|.*\bi just (?:gave|told) you\b.*|.*\bi said it before\b.*",
    re.I | re.S,
)
# Only where a data set holds no such human line at all.
FALLBACK = {"acknowledge": "Okay.", "closing": "No, that is all. Thanks.", "complain": "Sorry, what?"}


@dataclass(frozen=True)
class Said:
    """One user utterance: after which strategy, in which stretch between two results, and the slots it tells.

    ``more``: it asks for more, so it does not end a dialogue.
    """

    text: str
    after: str
    segment: int
    tells: frozenset[str] = frozenset()
    more: bool = False


@dataclass(frozen=True)
class Answer:
    """What the user says now. ``source``: own, pool, value or generic. ``tells``: slots the agent learns."""

    text: str
    source: str
    tells: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Line:
    """A pooled utterance and the values of its own dialogue that occur in it verbatim."""

    text: str
    values: tuple[tuple[str, str], ...]
    stray: bool  # digits outside those values: facts of another goal that cannot be replaced

    def adapted(self, values: Mapping[str, str]) -> str | None:
        """The line with ``values`` in place of its own; None when one is missing."""
        if self.stray or any(slot not in values for slot, _ in self.values):
            return None
        new = {old.casefold(): values[slot] for slot, old in self.values}
        if not new:
            return self.text
        # One pass, longest first, so that a value put in is not replaced again.
        alternatives = "|".join(re.escape(old) for old in sorted(new, key=len, reverse=True))
        pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.I)
        return pattern.sub(lambda match: new[match.group().casefold()], self.text)


def line(text: str, values: Iterable[tuple[str, str]]) -> Line:
    """A pooled line; ``values`` are all (slot, value) pairs of its dialogue."""
    found = tuple((slot, v) for slot, v in values if v and re.search(rf"(?<!\w){re.escape(v)}(?!\w)", text, re.I))
    rest = text
    for _, value in found:
        rest = re.sub(re.escape(value), "", rest, flags=re.I)
    return Line(text, found, bool(re.search(r"\d", rest)))


@dataclass
class Pool:
    """What the users of one task said: by strategy, and reactions that fit anywhere."""

    after: dict[str, list[Line]] = field(default_factory=lambda: defaultdict(list))
    acknowledge: list[str] = field(default_factory=list)
    closing: list[str] = field(default_factory=list)
    complain: list[str] = field(default_factory=list)

    def add(self, said: Said, values: Sequence[tuple[str, str]]) -> None:
        """Add one utterance of a dialogue whose (slot, value) pairs are ``values``."""
        entry = line(said.text, values)
        self.after[said.after].append(entry)
        if entry.values or entry.stray or len(said.text.split()) > 12:
            return
        if ACKNOWLEDGE.fullmatch(said.text):
            self.acknowledge.append(said.text)
        if said.after == "anything_else" and CLOSING.fullmatch(said.text) and "?" not in said.text:
            self.closing.append(said.text)
        if COMPLAINT.fullmatch(said.text):
            self.complain.append(said.text)

    def keep_apart(self, values: Iterable[str]) -> None:
        """Leave out the lines that name one of ``values`` which is not their own: facts that cannot be replaced."""
        either = "|".join(re.escape(value) for value in sorted(values, key=len, reverse=True))
        named = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.I)
        for strategy, lines in self.after.items() if either else ():
            own = [{value.casefold() for _, value in entry.values} for entry in lines]
            found = [{name.casefold() for name in named.findall(entry.text)} for entry in lines]
            self.after[strategy] = [entry for entry, o, f in zip(lines, own, found, strict=True) if f <= o]


class ReplayUser:
    """One user in one dialogue: ``said`` is the goal's own dialogue after the opening, ``pool`` its task's.

    ``everyone`` (all tasks) stands in where the task's users never reacted so. ``asked``: whose answers to questions
    may be borrowed (``pool`` when None). ``key`` of goal and seed decides what chance decides: the n-th line that is
    borrowed for a purpose is the same in every dialogue with that key, whatever was said between.
    """

    def __init__(self, said: Sequence[Said], pool: Pool, everyone: Pool, key: str, asked: Pool | None = None) -> None:
        self._said, self._pool, self._everyone, self._key = said, pool, everyone, key
        self._asked = asked or pool
        self._used: set[int] = set()
        self._drawn: Counter[str] = Counter()

    def tell(self, strategy: str, slots: Sequence[str], values: Mapping[str, str]) -> Answer:
        """Answer a question for ``slots``; always tells them. Own words that leave some out get their bare values."""
        wanted = frozenset(slots)
        telling = [i for i, said in enumerate(self._said) if wanted & said.tells]
        telling.sort(key=lambda i: (self._said[i].after != strategy, -len(wanted & self._said[i].tells)))
        own = self._first(telling)
        if own is not None:
            rest = [values[slot] for slot in slots if slot not in own.tells]
            return Answer(", ".join([own.text, *rest]), own.source, own.tells | wanted)
        lines = [entry for entry in self._asked.after.get(strategy, ()) if wanted == set(dict(entry.values))]
        borrowed = self._borrow(lines, {slot: values[slot] for slot in slots}, wanted, strategy)
        return borrowed or Answer(", ".join(values[slot] for slot in slots), "value", wanted)

    def react(self, strategy: str, segment: int, values: Mapping[str, str], *, fits: bool = False) -> Answer:
        """React to any other strategy, as a human of this task without own facts did.

        Where none ever did, the user acknowledges a turn that ``fits`` and complains about any other.
        """
        own = self.own(strategy, segment)
        if own is not None:
            return own
        lines = [entry for entry in self._pool.after.get(strategy, ()) if not entry.values]
        answer = self._borrow(lines, values, frozenset(), strategy)
        return answer or (self.acknowledge() if fits else self.complain())

    def go_on(self, strategy: str, segment: int, values: Mapping[str, str], early: Sequence[int] = ()) -> Answer:
        """A result was given and the user wants something more: their last words of ``segment`` say what.

        ``early``: own utterances before those that say a part of it; they come first, a line each.
        """
        here = [i for i, said in enumerate(self._said) if said.segment == segment]
        before = self.say(early)
        last = self._first(here[-1:]) or self.react(strategy, segment, values)
        return Answer(f"{before.text}\n{last.text}", last.source, before.tells | last.tells) if before else last

    def say(self, indices: Iterable[int]) -> Answer | None:
        """Those of the own utterances ``indices`` that were not replayed yet, a line each; None when none is left."""
        left = [i for i in indices if i not in self._used]
        self._used.update(left)
        told = frozenset[str]().union(*(self._said[i].tells for i in left))
        return Answer("\n".join(self._said[i].text for i in left), "own", told) if left else None

    def acknowledge(self) -> Answer:
        """Wait while the agent looks something up."""
        return self._any("acknowledge")

    def closing(self, strategy: str, segment: int | None) -> Answer:
        """All is done: the own last words, where ``segment`` is not None, else somebody's goodbye."""
        own = None if segment is None else self.own(strategy, segment, last=True)
        return own or self._any("closing")

    def once(self, text: str) -> Answer | None:
        """The own utterance ``text``, unless it was replayed before."""
        return self._first([i for i, said in enumerate(self._said) if said.text == text and i not in self._used])

    def complain(self) -> Answer:
        """The agent's turn made no sense to the user."""
        return self._any("complain")

    def own(self, strategy: str, segment: int, *, last: bool = False) -> Answer | None:
        """The next own utterance after ``strategy`` in ``segment`` not replayed yet; ``last``: asking for no more."""
        here = [i for i, said in enumerate(self._said) if said.after == strategy and said.segment == segment]
        return self._first([i for i in here if i not in self._used and not (last and self._said[i].more)])

    def _first(self, indices: Sequence[int]) -> Answer | None:
        """Replay the first of the own utterances ``indices``."""
        if not indices:
            return None
        self._used.add(indices[0])
        said = self._said[indices[0]]
        return Answer(said.text, "own", said.tells)

    def _borrow(
        self, lines: Sequence[Line], values: Mapping[str, str], tells: frozenset[str], strategy: str
    ) -> Answer | None:
        texts = [text for entry in lines if (text := entry.adapted(values)) is not None]
        return Answer(self._choice(f"after {strategy}", texts), "pool", tells) if texts else None

    def _any(self, kind: str) -> Answer:
        texts = getattr(self._pool, kind) or getattr(self._everyone, kind) or [FALLBACK[kind]]
        return Answer(self._choice(kind, texts), "generic")

    def _choice(self, purpose: str, texts: Sequence[str]) -> str:
        self._drawn[purpose] += 1
        return random.Random(f"{self._key}/{purpose}/{self._drawn[purpose]}").choice(texts)
