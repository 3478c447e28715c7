"""The environment ``multiwoz``: information and bookings in a town (MultiWOZ 2.1, arXiv 1907.01669), humans replayed.

One goal is one human dialogue. Domain by domain the user says what they look for; the agent asks for the rest, presents
something that the database has, tells the attributes that the user asks for, and books. Subgoals, of equal weight:
``inform`` (presented, as the database says), ``request`` (attributes told) and ``book`` for each domain; success is all
of them. A reply that does not state what it has to (the name, the attributes, the reference) completes nothing. A first
attempt that fails (the goal's fail_info, fail_book) is played where the human system turned it down; a search where the
user asked for it too, if the database has nothing. The user's words come from ``users/replay.py``: those with a value
that the goal does not have are not replayed. The strategies come from ``multiwoz_acts.yaml``.

Held out of data.json are the ids of valListFile and testListFile; of val.json alone, a fifth by a hash of the id. Left
out: dialogues without a goal, without a user's word, or with a search that the database cannot satisfy.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from openrlhf_gopo.envs.base import SPLITS, Dialogue, Environment, HumanTurn
from openrlhf_gopo.envs.multiwoz_db import ANY, Row, plain, query, same, says
from openrlhf_gopo.envs.multiwoz_dialogue import Beat, Case, MultiwozDialogue
from openrlhf_gopo.envs.multiwoz_reader import Exchange, Record, humans, read, table
from openrlhf_gopo.envs.multiwoz_sop import procedure, strategies
from openrlhf_gopo.envs.reading import CLEAR
from openrlhf_gopo.envs.replayed import PATIENCE
from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.sop import Procedure
from openrlhf_gopo.types import Goal, Strategy
from openrlhf_gopo.users.replay import Pool, ReplayUser, Said, line

CONTEXT = (
    "You are the information desk of a town. You look up restaurants, hotels, attractions, trains, hospitals and the "
    "police, and book tables, rooms, tickets and taxis."
)
SHORT = 10  # words
Database = Mapping[str, Sequence[Row]]


class Multiwoz(Environment):
    """MultiWOZ's dialogues as goals. ``census`` counts what was loaded and left out. ``database``: rows by domain."""

    name: ClassVar[str] = "multiwoz"
    blocking: bool = False
    max_turns: int = 24
    own_user: ClassVar[str | None] = "replay"

    def __init__(self, database: Database, records: Sequence[Record]) -> None:
        self.census: Counter[str] = Counter(dialogues=len(records))
        self.database, self._sop, self._catalogue = database, procedure(), strategies()
        self._goals: dict[str, list[Goal]] = {split: [] for split in SPLITS}
        self._cases: dict[str, Case] = {}
        self._humans = {f"multiwoz-{one.id}": one.turns for one in humans(records)}
        self._pool = Pool()
        for record in records:
            self._add(record)
        if not self._cases:
            raise DataError("multiwoz: no dialogue has a goal that the database can satisfy; check goal in data.json")

    @classmethod
    def load(cls, data: str | None) -> Multiwoz:
        """Read upstream's folder; see ``multiwoz_reader`` for its layout and errors."""
        return cls(*read(data))

    def goals(self, split: str) -> Sequence[Goal]:
        """One goal per dialogue, in file order."""
        return self._goals[split]

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """The same for every goal."""
        return self._catalogue

    def procedures(self) -> Mapping[str, Procedure]:
        return {self.name: Procedure(self._catalogue, self._sop)}

    def human(self, goal: Goal) -> Sequence[HumanTurn]:
        """The system's turns, by the act table."""
        return self._humans[goal.id]

    def case(self, goal: Goal) -> Case:
        """The human dialogue behind ``goal``, ready to replay.

        Raises:
            ConfigError: ``goal`` is not one of this environment's.
        """
        case = self._cases.get(goal.id)
        if case is None:
            raise ConfigError(f"multiwoz: goal {goal.id!r} is not in the loaded data; take goals from goals(split)")
        return case

    def start(self, goal: Goal, seed: int) -> Dialogue:
        """A fresh dialogue.

        Raises:
            ConfigError: ``goal`` is not one of this environment's.
        """
        case = self.case(goal)
        user = ReplayUser(case.said, self._pool, self._pool, f"{goal.id}/{seed}")
        return MultiwozDialogue(goal, case, self._sop, self.database, user, self.voice(goal, seed))

    def _add(self, record: Record) -> None:
        wants = {d: want for d, want in record.wants.items() if d != "taxi"}
        if not record.wants or not record.log or not record.log[0].user:
            self.census["left out: no goal or no words"] += 1
            return
        if not all(query(self.database[domain], want.info) for domain, want in wants.items()):
            self.census["left out: nothing in the database"] += 1
            return
        case = _case(record, self.database)
        goal = _goal(record, case)
        self.census[f"goals: {record.split}"] += 1
        self._goals[record.split].append(goal)
        self._cases[goal.id] = case
        if record.split == "train":  # the held-out users' words are seen in their own dialogue only
            self._lend(case, goal)

    def _lend(self, case: Case, goal: Goal) -> None:
        """Let others say what this user said, where it tells nothing but values that theirs can replace."""
        values = [(slot, value) for slot, value in goal.facts.items() if value not in CLEAR]
        for said in case.said:
            own = {slot for slot, _ in line(said.text, values).values}
            rest = {slot for slot in said.tells - own if not (own and slot.endswith(".book"))}
            if len(said.text.split()) <= SHORT and not rest:
                self._pool.add(said, values)


def _goal(record: Record, case: Case) -> Goal:
    names = []
    for domain in case.domains:
        want = record.wants[domain]
        names += [f"inform:{domain}"] if domain != "taxi" else [f"book:{domain}"]
        names += [f"request:{domain}"] if want.reqt and domain != "taxi" else []
        names += [f"book:{domain}"] if want.book and domain != "taxi" else []
    facts = {f"{d}.{s}": v for d, want in record.wants.items() for s, v in want.final.items()}
    return Goal(
        id=f"multiwoz-{record.id}",
        intent="+".join(sorted(record.wants)),
        context=CONTEXT,
        subgoals={name: 1 / len(names) for name in names},
        facts=facts,
        persona={"patience": PATIENCE},
        data={"dialogue": record.id},
        split=record.split,
    )


def _case(record: Record, database: Database) -> Case:
    at, order = _domains(record)
    index = {domain: number for number, domain in enumerate(order)}
    failing = frozenset(_failing(record, at, database))
    tried = {domain: want.tried(domain, failing) for domain, want in record.wants.items()}
    tells = [_tells(one, domain, record, tried) for one, domain in zip(record.log, at, strict=True)]
    first = {domain: at.index(domain) for domain in order if domain in at}
    for domain, i in first.items():
        tells[i].add(f"{domain}.!")
    beats = [
        Beat(one.user, one.strategy, one.system, index[d], frozenset(told))
        for one, d, told in zip(record.log, at, tells, strict=True)
    ]
    said = [
        Said(beat.user, last.strategy, last.domain, beat.tells)
        for last, beat, one in zip(beats, beats[1:], record.log[1:], strict=False)
        if beat.user and not _mistaken(one, record, tried)
    ]
    spoken = {domain: [one for one, d in zip(record.log, at, strict=True) if d == domain] for domain in order}
    return Case(
        domains=tuple(order),
        wants=record.wants,
        failing=failing,
        beats=tuple(beats),
        said=tuple(said),
        told=beats[0].tells,
        opens={domain: record.log[i].user for domain, i in first.items()},
        spoken={d: (" ".join(one.user for one in a), " ".join(one.system for one in a)) for d, a in spoken.items()},
        receipts={domain: _receipt(record, at, domain, database) for domain in order},
        last=frozenset(one.user for one in record.log if set(one.user_acts) and _ends(one)),
    )


def _domains(record: Record) -> tuple[list[str], list[str]]:
    """The domain of each exchange, and the goal's domains in the order the user came to them."""
    at: list[str] = []
    for one in record.log:
        named = [act.partition("-")[0].lower() for act in one.user_acts or one.system_acts]
        known = [domain for domain in named if domain in record.wants]
        at.append(at[-1] if at and (not known or at[-1] in known) else (known or list(record.wants))[0])
    return at, list(dict.fromkeys([*at, *record.wants]))


def _informs(one: Exchange, record: Record) -> Iterator[tuple[str, str, str]]:
    """What the user's acts state, in the goal's domains: (domain, slot, value)."""
    for act, pairs in one.user_acts.items():
        domain = act.partition("-")[0].lower()
        if act.endswith("-Inform") and domain in record.wants:
            for name, *value in pairs:
                if name in table()["slots"]:
                    yield domain, table()["slots"][name][0], str(value[0]) if value else ""


def _tells(one: Exchange, domain: str, record: Record, tried: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The slots that the user's words tell, by their acts or by the value; wishes for attributes or a booking.

    A slot of the goal is told by the value that the user tries first, any other slot by any value.
    """
    told = {f"{domain}.{slot}" for slot, value in tried[domain].items() if says(one.user, value)}
    for where, slot, value in _informs(one, record):
        wanted = tried[where].get(slot)
        if value not in ANY if wanted is None else same(value, wanted):
            told.add(f"{where}.{slot}")
    for act, pairs in one.user_acts.items():
        where = act.partition("-")[0].lower()
        if act.endswith("-Request") and where in record.wants and any(pair[0] != "Ref" for pair in pairs):
            told.add(f"{where}.?")
    book = record.wants[domain].book
    if book and ("book" in one.user or "reserv" in one.user or any(f"{domain}.{slot}" in told for slot in book)):
        told.add(f"{domain}.book")
    return told


def _mistaken(one: Exchange, record: Record, tried: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the user's words state a value for a slot of the goal that the goal does not have there."""
    for domain, slot, value in _informs(one, record):
        known = [v[slot] for v in (tried[domain], record.wants[domain].final) if slot in v]
        right = any(same(value, v) or says(one.user, v) for v in known)
        if known and not right and value not in ANY and value != "hotel":  # "a hotel" may be a guesthouse
            return True
    return False


def _ends(one: Exchange) -> bool:
    return all(act in ("general-thank", "general-bye") for act in one.user_acts)


def _failing(record: Record, at: Sequence[str], database: Database) -> list[str]:
    """The first attempts that the human system turned down or, for a search, the user asked for; see the module."""
    failing = []
    asked = [(domain, slot, plain(value)) for one in record.log for domain, slot, value in _informs(one, record)]
    for domain, want in record.wants.items():
        done = {one.strategy for one, d in zip(record.log, at, strict=True) if d == domain}
        tried = {slot: value for slot, value in want.fail_info.items() if not same(value, want.info.get(slot, ""))}
        played = "no_offer" in done or any((domain, slot, plain(value)) in asked for slot, value in tried.items())
        if tried and played and domain != "taxi" and not query(database[domain], {**want.info, **tried}):
            failing.append(f"info:{domain}")
        if want.fail_book and want.book and "no_book" in done:
            failing.append(f"book:{domain}")
    return failing


def _receipt(record: Record, at: Sequence[str], domain: str, database: Database) -> dict[str, str]:
    """What a booking returns: what the human system gave, else made up from the dialogue's id."""
    given: dict[str, str] = {}
    for one, d in zip(record.log, at, strict=True):
        if d == domain and one.strategy == "book":
            given |= {pair[0]: pair[1] for pairs in one.system_acts.values() for pair in pairs if len(pair) > 1}
    number = zlib.crc32(f"{record.id}/{domain}".encode())
    if domain != "taxi":
        return {"reference": given.get("Ref") or f"{number:08X}"}
    row = database["taxi"][0]
    colours, cars = row.get("taxi_colors") or ["black"], row.get("taxi_types") or ["car"]
    car = f"{colours[number % len(colours)]} {cars[number // 16 % len(cars)]}"
    return {"car": given.get("Car") or car, "phone": given.get("Phone") or f"07{number % 10**9:09d}"}
