"""One MultiWOZ conversation. It knows the case and the database; the agent sees observations and briefings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.envs.multiwoz_db import Row, chosen, query
from openrlhf_gopo.envs.multiwoz_reader import TITLES, Want, table
from openrlhf_gopo.envs.multiwoz_sop import ASK, BOOKED, LABELS, MORE, QUESTIONS, SLOTS, brief, shown
from openrlhf_gopo.envs.multiwoz_texts import heard, phrase, request
from openrlhf_gopo.envs.replayed import BYE, ReplayDialogue
from openrlhf_gopo.rewards.text import mentions as states
from openrlhf_gopo.sop.rules import Sop
from openrlhf_gopo.types import Goal
from openrlhf_gopo.users.base import Voice
from openrlhf_gopo.users.replay import Answer, ReplayUser, Said

PRESENT = ("offer", "inform", "book")  # strategies that name one of the database's, where none was named before


@dataclass(frozen=True)
class Beat:
    """One system turn of the human dialogue: the domain it is about, the user's words before it, what they tell."""

    user: str
    strategy: str
    text: str
    domain: int
    tells: frozenset[str]


@dataclass(frozen=True)
class Case:
    """One goal's human dialogue, ready to replay.

    ``domains``: in the order the user came to them; ``wants`` by domain. ``failing``: the goal's first attempts that
    came to nothing, as ``info:<domain>`` and ``book:<domain>``. ``opens``: by domain, the words that brought it up.
    ``spoken``: by domain, all that the human user said, and the system. ``receipts``: by domain, what a booking
    returns. ``last``: the user's words that end a dialogue. Slots are ``<domain>.<slot>``; of these ``!``, ``?`` and
    ``book`` are told when the user brings up the domain, asks for attributes, asks for a booking.
    """

    domains: tuple[str, ...]
    wants: Mapping[str, Want]
    failing: frozenset[str]
    beats: tuple[Beat, ...]
    said: tuple[Said, ...]
    told: frozenset[str]
    opens: Mapping[str, str]
    spoken: Mapping[str, tuple[str, str]]
    receipts: Mapping[str, Mapping[str, str]]
    last: frozenset[str]


class MultiwozDialogue(ReplayDialogue):
    """Plays ``case`` with ``user`` against ``database``. Single use.

    State: the domain under way (``index``); the ``rows`` presented; ``eased``: the failed attempts that were given up.
    """

    def __init__(
        self,
        goal: Goal,
        case: Case,
        sop: Sop,
        database: Mapping[str, Sequence[Row]],
        user: ReplayUser,
        voice: Voice,
    ) -> None:
        super().__init__(goal, user, case.told, case.beats[0].user, voice)
        self._case, self._sop, self._database = case, sop, database
        self._eased: set[str] = set()
        self._rows: dict[str, Row] = {}
        self._results: dict[tuple[object, ...], list[Row]] = {}  # of queries, since each is asked for many times
        self._index = 0
        self.opening = self._observe(Answer(self._words, "own", case.told))

    # -- what the agent is told ------------------------------------------------------------------------------------

    def briefing(self, strategy: str) -> str:
        """What the strategy is for; what the database has for what was told; what a booking returns."""
        told = {s: v for s, v in self._wanted("info").items() if f"{self._domain}.{s}" in self._told}
        return brief(strategy, self._domain, told, len(self._found()), self._row(), self._values("book"))

    def expected(self, strategy: str) -> tuple[str, ...]:
        """What a reply has to state: who is offered (a train's departure), the attributes asked for, the receipt."""
        return tuple(dict.fromkeys(self._values(strategy).values()))

    def reference_reply(self, strategy: str) -> str:
        """What the human of this dialogue said under ``strategy``, if it states what is expected; else a template."""
        own = next((beat.text for beat in self._fitting(strategy)), "")
        if own and all(states(own, value) for value in self.expected(strategy)):
            return own
        if strategy.startswith(ASK):
            return QUESTIONS[strategy.removeprefix(ASK)]
        values = self._values(strategy)
        told = ", ".join(f"{LABELS.get(key, key)}: {value}" for key, value in values.items())
        row = self._row() or {}
        train = f"the train {row.get('trainID')}, leaving at {row.get('leaveAt')}"
        entity = train if "trainID" in row else next(iter(values.values()), "this")
        return str(table()["say"][strategy].format(entity=entity, values=f"{told}." if told else "")).strip()

    def relevance(self) -> Mapping[str, int]:
        """3: of the required steps, the one the human took next, else the first. 2: another required step. 1: what
        does no harm: to present something early, to offer a booking or more help. 0: the rest."""
        steps = [step for step in self._steps() if step in self._required()]
        human = next((beat.strategy for beat in self._following()), "")
        best = human if human in steps else next(iter(steps), "")
        mild = {"offer", "offer_book", MORE} - set(self._history[-1:])
        return {s: 3 if s == best else 2 if s in steps else int(s in mild) for s in self._allowed()}

    # -- playing ---------------------------------------------------------------------------------------------------

    def _understood(self, strategy: str, reply: str) -> bool:
        return strategy not in self._required() or all(states(reply, value) for value in self.expected(strategy))

    def _play(self, strategy: str) -> tuple[Answer, list[str], list[str]]:
        domain, required, missing = self._domain, strategy in self._required(), self._missing()
        if strategy.startswith(ASK):
            return self._answer(strategy, strategy.removeprefix(ASK)), [], []
        if strategy in PRESENT and missing and not required:
            return self._user.tell(strategy, missing[:1], {missing[0]: self._value(missing[0])}), [], []
        events = [f"{strategy}:{domain}"] if required else []
        if required and strategy in ("no_offer", "no_book"):
            return self._ease(strategy), [], events
        completed = self._completes(strategy) if required else []
        row = self._row()
        if f"inform:{domain}" in completed and row:
            self._rows[domain] = row
        return self._user.own(strategy, self._index) or Answer("", "value"), completed, events

    def _answer(self, strategy: str, name: str) -> Answer:
        """What the goal says of the slot ``name``, due or not; a complaint about what was told or is out of place."""
        slot, want = f"{self._domain}.{name}", self._case.wants[self._domain]
        if slot in self._told or name not in SLOTS[self._domain]:
            return self._user.complain()
        if name in want.final:
            return self._user.tell(strategy, [slot], {slot: self._value(slot)})
        return self._user.react(strategy, self._index, {})

    def _ease(self, strategy: str) -> Answer:
        """The user gives up the attempt that failed, and says what they want instead."""
        part = "info" if strategy == "no_offer" else "book"
        self._eased.add(f"{part}:{self._domain}")
        own = self._user.own(strategy, self._index) or Answer("", "value")
        new = self._case.wants[self._domain].instead(part)
        rest = [phrase(slot, value) for slot, value in new.items() if not heard(own.text, slot, value)]
        text = " ".join([own.text, *([f"How about {', '.join(rest)}?"] if rest else [])]).strip()
        return Answer(text, own.source, own.tells | {f"{self._domain}.{slot}" for slot in new})

    def _follow(self, answer: Answer) -> Answer:
        """Where the agent is left without a step, the user says what they want next; words of farewell wait."""
        while not any(name.endswith(f":{self._domain}") for name in self._open()) and self._open():
            self._index += 1
        last = answer.text in self._case.last
        if answer.text and (last if not self._open() else self._steps() and not last):
            return answer
        # Words that leave the agent without a step, and tell nothing new, are about something else.
        useful = answer.text and not last and any(map(self._matters, self._new))
        wish = self._user.acknowledge() if self._steps() and self._open() else self._wish()
        if not useful:
            return wish
        return Answer(f"{answer.text} {wish.text}", answer.source, answer.tells | wish.tells)

    def _matters(self, slot: str) -> bool:
        """Whether what the goal still needs takes this ``slot`` or wish that was told."""
        domain, _, name = slot.partition(".")
        part = {"?": "request", "book": "book"}.get(name)
        if part is not None:
            return f"{part}:{domain}" in self._open()
        wanted = name == "!" or name in self._case.wants[domain].final
        return wanted and any(open_.endswith(f":{domain}") for open_ in self._open())

    def _wish(self) -> Answer:
        """What the user wants next; to bring up a domain they have words of their own."""
        domain = self._domain
        if not self._open():
            return self._user.closing(BYE, None)
        if not self._opened():
            own = self._user.once(self._case.opens.get(domain, ""))
            told = frozenset({f"{domain}.!"})
            text = f"I also need {'an' if domain[0] in 'aeiou' else 'a'} {domain}."
            return Answer(own.text, "own", own.tells | told) if own else Answer(text, "value", told)
        if f"request:{domain}" in self._open():
            return Answer(request(self._case.wants[domain].reqt), "value", frozenset({f"{domain}.?"}))
        return Answer("Please book it for me.", "value", frozenset({f"{domain}.book"}))

    # -- what holds now --------------------------------------------------------------------------------------------

    @property
    def _domain(self) -> str:
        return self._case.domains[self._index]

    def _open(self) -> list[str]:
        return [name for name in self._goal.subgoals if name not in self._completed]

    def _opened(self) -> bool:
        return any(slot.startswith(f"{self._domain}.") for slot in self._told)

    def _fails(self, part: str) -> bool:
        name = f"{part}:{self._domain}"
        return name in self._case.failing and name not in self._eased

    def _wanted(self, part: str) -> dict[str, str]:
        """The constraints (``info``) or the booking (``book``) as the user wants them now."""
        want = self._case.wants[self._domain]
        base, tried = (want.info, want.fail_info) if part == "info" else (want.book, want.fail_book)
        return {**base, **tried} if self._fails(part) else dict(base)

    def _value(self, slot: str) -> str:
        left = self._case.failing - self._eased
        return self._case.wants[self._domain].tried(self._domain, left)[slot.partition(".")[2]]

    def _missing(self) -> list[str]:
        """The slots that the next step needs and the user has not told: the constraints, then the booking's."""
        for part in ("info", "book") if f"{self._domain}.book" in self._told else ("info",):
            slots = [f"{self._domain}.{name}" for name in self._wanted(part)]
            missing = [slot for slot in slots if slot not in self._told]
            if missing:
                return missing
        return []

    def _found(self) -> list[Row]:
        told = {slot: v for slot, v in self._wanted("info").items() if f"{self._domain}.{slot}" in self._told}
        key = (self._domain, *told.items())
        if key not in self._results:
            self._results[key] = [] if self._domain == "taxi" else query(self._database[self._domain], told)
        return self._results[key]

    def _row(self) -> Row | None:
        """The one presented, else the one to present."""
        return self._rows.get(self._domain) or chosen(self._found(), *self._case.spoken[self._domain])

    def _values(self, strategy: str) -> dict[str, str]:
        """What ``strategy`` tells now, by name."""
        row = self._row()
        values: dict[str, str] = {}
        if row and (strategy == "offer" or (strategy in PRESENT and f"inform:{self._domain}" in self._open())):
            name = next(name for name in TITLES if name in row)
            values[name] = str(row[name])
        if strategy == "inform" and row and f"{self._domain}.?" in self._told:
            asked = self._case.wants[self._domain].reqt
            values |= {name: str(row[name]) for name in asked if shown(name, row.get(name))}
        if strategy == "book" and "bookable" in self._facts():
            values |= self._case.receipts[self._domain]
        return values

    def _steps(self) -> list[str]:
        """What the goal needs now, first things first; none while the user has not said what they want next."""
        if not self._open():
            return [BYE]
        if not self._opened():
            return []
        domain, asks = self._domain, [ASK + slot.partition(".")[2] for slot in self._missing()]
        if domain == "taxi":
            return asks or ["book"]
        known = all(f"{domain}.{slot}" in self._told for slot in self._wanted("info"))
        present = f"inform:{domain}" in self._open()
        if present and not (known and self._found()):
            return asks if self._found() else ["no_offer"]
        steps = ["offer"] if present else []
        steps += ["inform"] if present or (f"request:{domain}" in self._open() and f"{domain}.?" in self._told) else []
        if f"book:{domain}" in self._open() and f"{domain}.book" in self._told:
            steps += asks or ["no_book" if self._fails("book") else "book"]
        return steps

    def _completes(self, strategy: str) -> list[str]:
        """The open subgoals that ``strategy`` completes when its reply states what is expected."""
        names = ["inform"] if strategy in PRESENT else []
        names += ["request"] if strategy == "inform" and f"{self._domain}.?" in self._told else []
        names += ["book"] if strategy == "book" else []
        return [subgoal for name in names if (subgoal := f"{name}:{self._domain}") in self._open()]

    def _required(self) -> set[str]:
        return set(self._steps()).intersection(self._allowed())

    def _facts(self) -> set[str]:
        domain, told = self._domain, self._told
        talked = {slot.partition(".")[0] for slot in told}
        facts = {f"slot:{slot}" for other in talked for slot in SLOTS[other]}
        if domain != "taxi" and self._opened():
            facts.add("found" if self._found() else "nothing")
        booked = [f"{domain}.{slot}" for slot in BOOKED.get(domain, ())]
        if domain in BOOKED and self._opened() and told.issuperset(booked) and "nothing" not in facts:
            facts.add("unbookable" if self._fails("book") else "bookable")
        return facts

    def _allowed(self) -> tuple[str, ...]:
        return self._sop.allowed(self._history, self._facts())

    def _following(self) -> list[Beat]:
        """The human's turn after the user's latest words, where these are of this dialogue."""
        return [beat for beat in self._case.beats if beat.user and self._words.startswith(beat.user)][:1]

    def _fitting(self, strategy: str) -> list[Beat]:
        """The human's turns under ``strategy`` that may fit now, the best first."""
        here = [beat for beat in self._case.beats if beat.strategy == strategy and beat.domain == self._index]
        return [beat for beat in self._following() if beat.strategy == strategy] + here
