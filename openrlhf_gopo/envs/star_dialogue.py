"""One STAR conversation. It knows the script and the manual; the agent sees observations and briefings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openrlhf_gopo.envs.reading import CLEAR
from openrlhf_gopo.envs.replayed import BYE, ReplayDialogue
from openrlhf_gopo.envs.star_outcome import of_rounds, standing
from openrlhf_gopo.envs.star_script import Round, Script, report_ids
from openrlhf_gopo.envs.star_sop import CONFUSED, HELLO, MORE, Manual, describe
from openrlhf_gopo.errors import DataError
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.types import Goal
from openrlhf_gopo.users.base import Voice
from openrlhf_gopo.users.replay import Answer, ReplayUser

LONG = 6  # words; a longer value need not stand in a reply verbatim
# Said while a later query runs, so that a dialogue of several rounds does not repeat itself.
AGAIN = {
    "check": ("Sure, I will check that for you.", "Of course. Just a second.", "Let me have a look."),
    "book": ("Sure, I will book that for you.", "Of course. I am booking it now.", "Alright, I am making the booking."),
}
AWAY = " minutes away"  # of a value, where the template says "minutes" too
# The item's field behind a template's placeholder, where it is not the same name; the first the item has.
FIELDS = {
    "balance": ("BankBalance",), "temperature": ("TemperatureCelsius",), "pois": ("NearbyPOIs",),
    "hotel_name": ("HotelName", "Name"), "restaurant_name": ("RestaurantName", "Name"), "apartment_name": ("Name",),
    "venue_name": ("VenueName", "Name"), "guest_name": ("GuestName", "Name"), "doctor_name": ("DoctorName", "Name"),
    "floor": ("Level",), "size": ("FloorSquareMeters",), "num_bedrooms": ("NumRooms",), "instructions": ("Message",),
    "hotel_location": ("Location",), "price_range": ("Cost",), "food_type": ("Food",), "rating": ("AverageRating",),
    "booking_id": ("id",), "flight_id": ("id",), "clazz": ("Class",), "duration": ("DurationHours",),
    "minutes_till_pickup": ("MinutesTillPickup", "RideWait"), "time": ("Time", "StartTimeHour"),
    "simple_instruction": ("WalkingInstructions", "TransitInstructions", "DrivingInstructions"),
    "detailed_instruction": (
        "DetailedWalkingInstructions", "DetailedTransitInstructions", "DetailedDrivingInstructions",
    ),
}  # fmt: skip


def brief(manual: Manual, strategy: str, shown: Mapping[str, str] | None) -> str:
    """The reply template of ``strategy``; for a report also the tool's values, as ``shown`` (None: no result yet)."""
    lines = [f"Say: {describe(manual.templates[strategy])}"]
    if shown is not None and strategy in manual.reports:
        item = [f"{key}: {value}" for key, value in shown.items() if value]
        lines.append(f"Tool result: {'; '.join(item) or 'nothing found'}")
    return "\n".join(lines)


class StarDialogue(ReplayDialogue):
    """Plays ``script`` with ``user``. Single use.

    State: slots ``told``; the number of results so far (``segment``); the reports still ``owed`` for the latest one;
    whether a query found something missing since the user last told a slot (``stale``).
    """

    def __init__(self, goal: Goal, script: Script, manual: Manual, user: ReplayUser, voice: Voice) -> None:
        # A slot the API requires but this goal's wizard never entered has a default.
        default = set(manual.task.required) - {s for r in script.rounds for s in r.needs}
        first = user.say(script.wishes[0]) if script.wishes else None
        words = f"{script.opening.text}\n{first.text}" if first else script.opening.text
        super().__init__(goal, user, script.opening.tells | default, words, voice)
        self._script, self._manual = script, manual
        self._outcomes = standing(of_rounds(script))
        self._segment = 0
        self._owed: list[tuple[str, tuple[str, ...]]] = []  # (subgoal, reports that complete it)
        self._stale = False
        self._replayed: list[str] = []  # strategies of this segment, for "what the human did next"
        self._wish = first.text if first else ""  # over several tasks: the words that asked for what comes next
        self.opening = self._observe(Answer(self._words, "own", script.opening.tells))

    # -- what the agent is told ------------------------------------------------------------------------------------

    def briefing(self, strategy: str) -> str:
        """The reply template, and after a result the tool's values."""
        if self._result() is None:
            return brief(self._manual, strategy, None)
        return brief(self._manual, strategy, {k: self._shown(k, v, strategy) for k, v in self._item().items()})

    def expected(self, strategy: str) -> tuple[str, ...]:
        """The result's values that the reference reply states; none longer than ``LONG`` words."""
        if self._result() is None or strategy not in self._manual.reports:
            return ()
        reply = self.reference_reply(strategy)
        items = (value for value in self._item().values() if isinstance(value, (str, int, float)))
        values = [str(value).removesuffix(AWAY) for value in items]
        stated = [v for v in values if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", reply) and len(v.split()) <= LONG]
        return tuple(dict.fromkeys(v for v in stated if v not in ("", "True", "False")))

    def reference_reply(self, strategy: str) -> str:
        """What the human wizard said under ``strategy`` after the same result, else the filled template."""
        own = self._human(strategy)
        if strategy in self._manual.queries.values() and self._segment:
            again = AGAIN["book" if strategy.endswith("book") else "check"]
            own = again[(self._segment - 1) % len(again)]
        if own:
            return own
        template = " ".join(self._manual.templates[strategy].split())
        filled = re.sub(r"\{(\w+):?\w*\}", lambda match: self._fill(match.group(1), strategy), template)
        # A value may bring an article or a full stop that the template has as well: "the The Porch".
        return re.sub(r"(?<!\.)\.\.$", ".", re.sub(r"\b[Tt]he (?=The\b)", "", filled))

    def relevance(self) -> Mapping[str, int]:
        """3: of the required steps, the one the human wizard took next. 2: another required step. 1: an unused
        strategy of the task that does no harm now. 0: the rest (repeats, questions already answered, "I don't
        understand", a goodbye or a query that comes too early). Exactly one allowed strategy has 3."""
        required = self._required()
        human = [beat.label for beat in self._script.beats if beat.segment == self._segment]
        best = next((label for label in human if label in required), None)
        if best is None:
            best = next((s.id for s in self._manual.strategies if s.id in required), None)
        if best is None:
            raise DataError(
                f"--gopo.data: dialogue {self._script.record.id}: no strategy of its tasks does what it needs next, "
                f"{', '.join(sorted(required)) or 'nothing'}; restore tasks/ and the dialogue"
            )
        return {s: 3 if s == best else 2 if s in required else int(self._harmless(s)) for s in self._allowed()}

    # -- playing ---------------------------------------------------------------------------------------------------

    def _follow(self, answer: Answer) -> Answer:
        self._stale = self._stale and not self._new
        return answer

    def _stated(self, text: str) -> list[str]:
        return [v for _, v in self._script.values if v.casefold() not in CLEAR and mentions(text, v)]

    def _play(self, strategy: str) -> tuple[Answer, list[str], list[str]]:
        if strategy in self._manual.queries.values():
            return self._query()
        self._replayed.append(strategy)
        # The report that is named by it comes first: one that it may stand for can be given in other ways too.
        fitting = sorted((owed for owed in self._owed if strategy in owed[1]), key=lambda owed: owed[1][0] != strategy)
        match = next(iter(fitting), None)
        if match is not None:
            self._owed.remove(match)
            outcomes = [] if self._owed else self._outcomes.get(self._segment - 1, [])
            return self._after_report(strategy), [match[0], *outcomes], [f"report:{strategy}"]
        slot = self._manual.asks.get(strategy)
        if slot in self._told:
            return self._user.complain(), [], []
        if slot is not None and slot in self._needs():
            return self._user.tell(strategy, (slot,), self._values()), [], []
        if self._done() and strategy == MORE:
            return self._last_words(strategy), [], []
        if self._script.wishes:
            return self._hold_to_wish(strategy), [], []
        return self._user.react(strategy, self._segment, self._values()), [], []

    def _hold_to_wish(self, strategy: str) -> Answer:
        """Over several tasks: asked what they want, the user says it again; asked about another task, they wonder."""
        own = self._user.own(strategy, self._segment)
        if own or (strategy in (HELLO, MORE, CONFUSED) and self._wish):
            return own or Answer(self._wish, "own")
        rounds = self._script.rounds[self._segment :]
        slot, open_slots = self._manual.asks.get(strategy), self._manual.slots[rounds[0].result[0]] if rounds else ()
        if strategy == CONFUSED or (slot and slot not in open_slots):
            return self._user.complain()
        return self._user.react(strategy, self._segment, self._values())

    def _query(self) -> tuple[Answer, list[str], list[str]]:
        """Run the query of the next round, unless the user still has to tell something it needs."""
        if self._missing():
            self._stale = True
            return self._user.acknowledge(), [], [f"query:missing {', '.join(sorted(self._missing()))}"]
        current = self._script.rounds[self._segment]
        ids = report_ids(self._script, self._segment)
        self._segment += 1
        self._replayed, self._wish = [], ""
        closers = self._manual.closers[current.result]
        labels: list[tuple[str, ...]] = [(label,) for label in current.reports] or [closers]
        labels[0] = tuple(dict.fromkeys((*labels[0], *closers)))
        self._owed = list(zip(ids, labels, strict=True))
        return self._user.acknowledge(), [], [f"query:{current.result[1]}"]

    def _after_report(self, strategy: str) -> Answer:
        if self._owed:
            return self._user.react(strategy, self._segment, self._values())
        if self._done():
            return self._last_words(strategy)
        upcoming = self._script.rounds[self._segment]
        told = frozenset(upcoming.needs) - upcoming.extra
        wish = self._script.wishes[self._segment] if self._script.wishes else ()
        self._wish = "\n".join(self._script.said[i].text for i in wish)
        if wish:  # what was said too early is said again
            answer = self._user.say(wish) or Answer(self._wish, "own")
        elif upcoming.extra:  # the user answers those questions later
            answer = self._user.react(strategy, self._segment, self._values())
        else:
            answer = self._user.go_on(strategy, self._segment, self._values(), upcoming.early)
        return Answer(answer.text, answer.source, answer.tells | told)

    def _last_words(self, strategy: str) -> Answer:
        """All is done. Where later rounds were cut, the user's own words would ask for more."""
        return self._user.closing(strategy, None if self._script.cut else self._segment)

    # -- what holds now --------------------------------------------------------------------------------------------

    def _allowed(self) -> tuple[str, ...]:
        result = self._result()
        request = None
        if not self._owed and not self._stale and not self._done():
            request = self._script.rounds[self._segment].result[0]
        after = result.result if result else None
        facts = self._manual.facts(self._told, after, self._replayed, bool(self._owed), request)
        return self._manual.sop.allowed(self._history, facts)

    def _required(self) -> set[str]:
        """The steps that the goal needs now; each is allowed, and there is at least one."""
        allowed = self._allowed()
        if self._owed:
            steps = {label for _, labels in self._owed for label in labels}
        elif self._done():
            steps = {BYE}
        elif self._missing():
            steps = {label for label, slot in self._manual.asks.items() if slot in self._missing()}
        else:
            steps = {self._manual.queries[self._script.rounds[self._segment].result[0]]}
        beats = self._script.beats
        if not self._history and beats and beats[0].label == HELLO and not self._wish:
            steps.add(HELLO)
        return steps.intersection(allowed)

    def _harmless(self, strategy: str) -> bool:
        if strategy in self._history or strategy in (HELLO, CONFUSED, BYE, *self._manual.queries.values()):
            return False
        return self._manual.asks.get(strategy) not in self._told

    def _done(self) -> bool:
        return self._segment == len(self._script.rounds) and not self._owed

    def _needs(self) -> Mapping[str, str]:
        return {} if self._segment == len(self._script.rounds) else self._script.rounds[self._segment].needs

    def _missing(self) -> set[str]:
        return set(self._needs()) - self._told

    def _result(self) -> Round | None:
        return self._script.rounds[self._segment - 1] if self._segment else None

    def _item(self) -> Mapping[str, Any]:
        result = self._result()
        return result.item if result else {}

    def _values(self) -> dict[str, str]:
        """This goal's slot values as they stand in the current round."""
        values = dict(self._goal.facts)
        for current in self._script.rounds[: self._segment + 1]:
            values.update(current.needs)
        return values

    def _human(self, strategy: str) -> str:
        """The human wizard's words under the report ``strategy`` after the same result; "" when there are none."""
        own = [b.text for b in self._script.beats if b.label == strategy and b.segment == self._segment]
        used = strategy in self._manual.reports and own
        return own[min(self._replayed.count(strategy), len(own) - 1)] if used else ""

    def _shown(self, key: str, value: Any, strategy: str) -> str:
        """A tool value as the agent reads it. Of directions, a list, the step the human gave, else the next one."""
        if not isinstance(value, list) or not value:
            return "" if value is None or value == [] else str(value)
        if not key.casefold().endswith("instructions"):
            return ", ".join(map(str, value))
        human = self._human(strategy)
        said = [str(step) for step in value if str(step).rstrip(".") in human]
        return said[0] if said else str(value[min(self._replayed.count(strategy), len(value) - 1)])

    def _fill(self, name: str, strategy: str) -> str:
        """The value for a template's placeholder: from the result, else from what the user told, else its name."""
        known = {key.rpartition(".")[2].casefold(): v for key, v in self._values().items() if key in self._told}
        reported = self._result()
        known |= {key.rpartition(".")[2].casefold(): v for key, v in (reported.needs if reported else {}).items()}
        known |= {key.casefold(): value for key, value in self._item().items()}
        for key in (*FIELDS.get(name, ()), name.replace("_", "")):
            value = self._shown(key, known.get(key.casefold()), strategy)
            if value:
                return _worded(name, value)
        return name.replace("_", " ")


def _worded(name: str, value: str) -> str:
    """``value`` as a template's sentence has it: a flat "has a balcony" or "does not have an elevator"."""
    if not name.startswith("has_") or value not in ("True", "False"):
        return value.removesuffix(AWAY)
    thing = name.removeprefix("has_")
    return f"{'has' if value == 'True' else 'does not have'} {'an' if thing[0] in 'aeiou' else 'a'} {thing}"
