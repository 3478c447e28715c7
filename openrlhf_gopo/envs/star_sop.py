"""The standard operating procedure of one STAR task: its strategies, what each is for, and when it is allowed.

Humans do not follow STAR's graphs step by step, so the graph gives preconditions, not the next node: an ask is always
allowed, a query needs the slots its API requires, a report needs a result of the kind it reports, a verdict on what the
user said (trivia) the report before it. Where the graph is silent about a report, the results after which the wizards
of that task used it decide. The graph's "yes" and "no" are the user's wish, which the dialogue supplies as a fact: a
query, or a booking, is allowed while the user wants one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.envs.star_reader import Event, Record, Task
from openrlhf_gopo.sop.rules import Rule, Sop
from openrlhf_gopo.types import Strategy

HELLO, MORE, CONFUSED = "hello", "anything_else", "out_of_scope"
SHARED = {
    HELLO: "Hello, how can I help?",
    MORE: "Is there anything else that I can do for you?",
    CONFUSED: "I am sorry, I don't quite understand what you mean.",
    BYE: "Thank you and goodbye.",
}
QUERIES = ("query", "query_check", "query_book")
QUERY_TEXT = {
    "query": "One moment, please. I am looking that up.",
    "query_check": "One moment, please. I am checking that.",
    "query_book": "One moment, please. I am booking that.",
}
# Graph nodes that are states of the result or the user, not utterances: (phase, status) of the result they stand for.
OUTCOMES = {"available": ("check", "ok"), "unavailable": ("check", "fail")}
# The other nodes that are no utterances: the tool's results, and the user's wish.
STATES = {*OUTCOMES, *QUERIES, "query_success", "query_failure", "yes", "no"}
# Which slot a question asks for, where its label does not spell the slot's name; the first that the task's API has.
ASKED = {
    "ask_name": ("FullName", "CustomerName", "UserName", "PatientName", "GuestName", "RenterName", "HostName"),
    "name": ("Name",), "apartment_name": ("Name",), "doctor_name": ("Name",), "guest_name": ("Name",),
    "hotel": ("Name",), "venue": ("Name",), "restaurant": ("Name",), "host": ("HostName",),
    "start_time": ("StartTimeHour",), "starting_time": ("StartTimeHour",), "end_time": ("EndTimeHour",),
    "date_from": ("StartDate",), "date_to": ("EndDate",), "custom_message": ("Message",),
    "num_bedrooms": ("NumRooms",), "floor": ("Level",), "balcony": ("HasBalcony",), "elevator": ("HasElevator",),
    "price": ("Price", "Cost"), "rating": ("AverageRating",), "location": ("Location", "City"),
    "food_type": ("Food",), "delivery": ("DoesDelivery",), "size": ("PartySize",), "reason": ("MeetingReason",),
    "dob": ("DateOfBirth",), "mothers_maiden_name": ("SecurityAnswer1",), "childhood_pets_name": ("SecurityAnswer2",),
    "fraud_details": ("FraudReport",), "number_of_guests": ("NumberGuests",), "food": ("FoodRequest",),
    "drinks": ("DrinksRequest",), "parking_needed": ("NeedParking",), "flight_id": ("id",),
    "booking_number": ("id",), "destination": ("ArrivalLocation",), "departure": ("DepartureLocation",),
    "change": ("ChangeDescription",), "service_request": ("CustomerRequest",), "rank": ("UserRank",),
    "colour_top_cable": ("ColorOfTopCable",), "colour_second_cable": ("ColorOfSecondCable",),
    "question_number": ("QuestionNum",),
}  # fmt: skip
FAILED = re.compile(
    r"unavail|fail|conflict|not auth|must provide|too small|booked at|not found|not available|cannot", re.I
)
Result = tuple[str, str]  # (phase, status): phase is check or book; status is ok, fail or empty


@dataclass(frozen=True)
class Manual:
    """What the agent may do in one task.

    ``asks`` maps a question to its slot; ``reports`` a report to the results it may follow; ``closers`` a result to
    the reports that the graph (else the wizards) give it; ``queries`` a phase to its query, ``slots`` a phase to the
    slots that its task has a question for. ``answers``: the reports that answer what the user replied to another one.
    """

    task: Task
    strategies: tuple[Strategy, ...]
    templates: Mapping[str, str]
    asks: Mapping[str, str]
    reports: Mapping[str, frozenset[Result]]
    closers: Mapping[Result, tuple[str, ...]]
    queries: Mapping[str, str]
    slots: Mapping[str, frozenset[str]]
    answers: frozenset[str]
    sop: Sop

    def facts(
        self, told: Collection[str], result: Result | None, said: Collection[str], pending: bool, request: str | None
    ) -> set[str]:
        """The SOP's facts: the slots told, what may follow the result and the strategies ``said`` since, whether it was
        reported, the query due."""
        may = {label for label, after in self.reports.items() if result in after}
        may -= self.answers if self.reports.keys().isdisjoint(said) else set()
        facts = set(told) | {f"may:{label}" for label in may}
        facts.update([f"due:{request}"] if request else [])
        facts.update(["reported"] if result and not pending else [])
        facts.update([] if pending else ["settled"])
        return facts


def status(item: Mapping[str, object]) -> str:
    """How a knowledge base result came out: ok, fail or empty."""
    if not item:
        return "empty"
    message = str(item.get("Message") or item.get("ReservationStatus") or "")
    return "fail" if FAILED.search(message) else "ok"


def phase(query: Event, task: Task) -> str:
    """``book`` for a query that changes something where the task tells it from a check, else ``check``.

    A query of several tasks is labelled with its phase: ``task:book``, ``task:check``.
    """
    booked = "query_book" in task.replies and "Book" in str(query.values.get("RequestType", ""))
    return query.label or ("book" if booked else "check")


def slot_of(label: str, inputs: Sequence[str]) -> str | None:
    """The API slot that a question asks for; None when it is no question for a slot."""
    key = label if label.startswith("ask_") else label.partition("_ask_")[2]
    names = ASKED.get(key, (key.removeprefix("ask_").replace("_", ""),))
    known = {slot.casefold(): slot for slot in inputs}
    return next((known[name.casefold()] for name in names if name.casefold() in known), None) if key else None


def canonical(event: Event, task: Task, domain: str) -> str:
    """The strategy of a wizard turn; "" when it has none.

    The goodbyes become one strategy. A turn without a label (or with ``custom``) gets that of the template it
    resembles: at least 60% of the words of both together.
    """
    label = event.label
    if re.fullmatch(r"goodbye_\d+|(\w+_)?bye", label):
        return BYE
    for name in (label, f"{domain}_{label}"):
        if name in task.replies or name in SHARED:
            return name
    return _inferred(event.text, task)


def _inferred(text: str, task: Task) -> str:
    words = _words(text)
    if len(text) < 60 and words & {"goodbye", "bye"}:
        return BYE
    best, label = 0.6, ""
    for name in sorted(task.written):
        template = _words(re.sub(r"\{.*?\}", "", task.replies[name]))
        overlap = len(words & template) / max(1, len(words | template))
        if overlap >= best and len(template) > 2:
            best, label = overlap, name
    return BYE if re.fullmatch(r"goodbye_\d+|(\w+_)?bye", label) else label


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.casefold()))


def write_manual(task: Task, records: Iterable[Record]) -> Manual:
    """The manual of ``task``, from its graph and from what the wizards of ``records`` (all of this task) did."""
    used, after = _observed(task, records)
    uttered = {*task.written, *used, *(label for label in task.replies if label.endswith("nothing_found"))}
    said = {k: v for k, v in task.replies.items() if k in uttered}
    said = {k: v for k, v in said.items() if k not in SHARED and not re.fullmatch(r"goodbye_\d+|(\w+_)?bye", k)}
    asks = {label: slot for label in said if (slot := slot_of(label, task.inputs))}
    queries = {"check": "query_check" if "query_check" in task.replies else "query"}
    queries |= {"book": "query_book"} if "query_book" in task.replies else {}
    closers = _closers(task, said)
    answers = _answers(task, closers)
    reports: dict[str, set[Result]] = {}
    for label, template in said.items():
        results = {result for result, labels in closers.items() if label in labels}
        seen, total = after[label], used[label]
        late = 2 * sum(seen.values()) >= total if total else "{" in template
        early = task.graph.get(label) in QUERIES  # it leads to a query
        if label in asks or not (results or (late and not early)):
            continue
        observed = {r for r, n in seen.items() if n >= max(2, total / 10)}
        reports[label] = results or observed or {(part, "ok") for part in queries}
    _complete(closers, reports, after, queries)
    strategies, templates = _catalogue(task, said, asks, queries)
    return Manual(
        task=task,
        strategies=strategies,
        templates=templates,
        asks=asks,
        reports={label: frozenset(results) for label, results in reports.items()},
        closers=closers,
        queries=queries,
        slots=dict.fromkeys(queries, frozenset(asks.values())),
        answers=answers.intersection(reports),
        sop=write_sop(f"star, {task.id}", strategies, reports, queries, dict.fromkeys(queries, task.required)),
    )


def _observed(task: Task, records: Iterable[Record]) -> tuple[Counter[str], dict[str, Counter[Result]]]:
    """How often each label was used, and after which kind of result (the latest one) when there was any."""
    used: Counter[str] = Counter()
    after: dict[str, Counter[Result]] = defaultdict(Counter)
    for record in records:
        query, result = None, None
        for event in record.events:
            if event.kind == "query":
                query = event
            elif event.kind == "result" and query is not None:
                result = (phase(query, task), status(event.values))
            elif event.kind == "wizard":
                label = canonical(event, task, task.id.partition("_")[0])
                used[label] += 1
                if result is not None:
                    after[label][result] += 1
    return used, after


def _closers(task: Task, said: Mapping[str, str]) -> dict[Result, tuple[str, ...]]:
    """The reports that the graph puts after each kind of result."""
    tail = "book" if "query_book" in task.replies and "available" in task.graph else "check"
    nodes = {
        **OUTCOMES,
        "query_success": (tail, "ok"),
        "query_failure": (tail, "fail"),
        "query": ("check", "ok"),
        "query_check": ("check", "ok"),
        "query_book": ("book", "ok"),
    }
    found: dict[Result, tuple[str, ...]] = {}
    for node, result in nodes.items():
        target = task.graph.get(node, "")
        if target in said:
            found[result] = (*found.get(result, ()), target)
    nothing = tuple(label for label in said if label.endswith("nothing_found"))
    if nothing:
        found[("check", "empty")] = nothing
    return found


def _answers(task: Task, closers: Mapping[Result, tuple[str, ...]]) -> frozenset[str]:
    """What the graph puts after a state of the user alone: trivia's "correct" makes no sense before the question."""
    after_result = {label for labels in closers.values() for label in labels}
    states = task.graph.keys() - task.written - STATES
    return frozenset(task.graph[state] for state in states) - after_result


def _complete(
    closers: dict[Result, tuple[str, ...]],
    reports: dict[str, set[Result]],
    after: Mapping[str, Counter[Result]],
    queries: Iterable[str],
) -> None:
    """Find a report for every kind of result the graph is silent about.

    The one that the wizards used most then; else what follows its like: the check's, and for nothing found a failure's.
    """
    for outcome in ("ok", "fail", "empty"):
        for part in sorted(queries, reverse=True):  # the check first
            result = (part, outcome)
            best = max(reports, key=lambda label: after[label][result], default="")
            observed = (best,) if best and after[best][result] else ()
            like = closers.get(("check", outcome)) or closers.get((part, "fail")) or tuple(reports)
            closers[result] = closers.get(result) or observed or like
            for label in closers[result]:
                reports[label].add(result)


def _catalogue(
    task: Task, said: Mapping[str, str], asks: Mapping[str, str], queries: Mapping[str, str]
) -> tuple[tuple[Strategy, ...], dict[str, str]]:
    others = [label for label in said if label not in asks]
    order = [HELLO, *asks, *queries.values(), *others, MORE, CONFUSED, BYE]
    shared = {label: task.replies.get(label, text) for label, text in SHARED.items()}
    templates = {**said, **shared, **{query: QUERY_TEXT[query] for query in queries.values()}}
    domain = task.id.partition("_")[0]
    strategies = tuple(
        Strategy(
            id=label,
            name=label.removeprefix(f"{domain}_").replace("_", " "),
            description=describe(templates[label]),
            asks=(asks[label],) if label in asks else (),
            gives=tuple(re.findall(r"\{(\w+)", templates[label])) if label in others else (),
            does=(label,) if label in QUERIES else (),
        )
        for label in order
    )
    return strategies, templates


def describe(template: str) -> str:
    """A reply template on one line, its placeholders without their formats."""
    return re.sub(r"\{(\w+):?\w*\}", r"{\1}", " ".join(template.split()))


def write_sop(
    name: str,
    strategies: Sequence[Strategy],
    reports: Collection[str],
    queries: Mapping[str, str],
    needed: Mapping[str, Sequence[str]],
) -> Sop:
    """The rules over ``strategies``; ``needed``: by phase, the slots its API requires."""
    ids = tuple(strategy.id for strategy in strategies)
    slots = {strategy.asks[0] for strategy in strategies if strategy.asks}
    free = {strategy.id for strategy in strategies if not strategy.asks}.difference(reports, queries.values(), (BYE,))
    rules = [Rule(label, no_repeat=True) for label in ids if label != BYE]
    rules += [Rule(label, max_uses=2) for label in ids if label in free]
    rules += [Rule(label, requires_facts=(f"may:{label}",)) for label in reports]
    for part, query in queries.items():
        told = tuple(slot for slot in needed[part] if slot in slots)
        rules.append(Rule(query, requires_facts=(*told, f"due:{part}")))
    rules.append(Rule(HELLO, not_after=tuple(label for label in ids if label not in (HELLO, BYE))))
    rules.append(Rule(MORE, requires_facts=("reported",)))
    rules.append(Rule(BYE, requires_facts=("settled",), after_any=tuple(label for label in ids if label != BYE)))
    return Sop(ids, rules=tuple(rules), terminal=(BYE,), name=name)
