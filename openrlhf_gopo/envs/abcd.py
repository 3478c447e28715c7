"""The environment ``abcd``: customer service of an online shop (ABCD, arXiv 2104.00783, MIT), humans replayed.

One goal is one human dialogue. The agent knows the flow (the department) and its guidelines; the subflow (what the
customer wants) is hidden. It asks for what the actions take, clicks the actions that the subflow requires, and says
goodbye. A goal succeeds when all of that was done. An action that the guidelines make depend on the case ("if",
"option", "optional") is required where the human agent used it. The customer's words come from ``users/replay.py``.

Upstream's train split is ``train``, its dev and test are ``heldout``; where the file has no splits, a hash of the
dialogue id decides. Left out: dialogues without a turn after the customer's first words. ``Abcd.census`` counts it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from openrlhf_gopo.envs.abcd_dialogue import AbcdDialogue, Case
from openrlhf_gopo.envs.abcd_reader import Flow, Manual, Record, read
from openrlhf_gopo.envs.abcd_sop import LOOKUPS, write_procedure
from openrlhf_gopo.envs.abcd_sop import Procedure as FlowProcedure
from openrlhf_gopo.envs.abcd_turns import ASK, MORE, REPLY, humans
from openrlhf_gopo.envs.base import SPLITS, Dialogue, Environment, HumanDialogue, HumanTurn
from openrlhf_gopo.envs.reading import mentions
from openrlhf_gopo.envs.replayed import BYE, PATIENCE
from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.rewards.text import values as stated
from openrlhf_gopo.sop import Procedure
from openrlhf_gopo.types import Goal, Strategy
from openrlhf_gopo.users.replay import Line, Pool, ReplayUser, Said, line

SHORT = 8  # words
ASKS_WEIGHT, ACTIONS_WEIGHT, CLOSE_WEIGHT = 0.3, 0.6, 0.1


class Abcd(Environment):
    """ABCD's dialogues as goals. ``census`` counts what was loaded and what was left out."""

    name: ClassVar[str] = "abcd"
    blocking: bool = False
    max_turns: int = 18
    own_user: ClassVar[str | None] = "replay"

    def __init__(self, manual: Manual, records: Sequence[Record]) -> None:
        split = {record.id: record.split for record in records}
        people = list(humans(manual, records))
        if not people:
            raise DataError("abcd: no dialogue in which the customer speaks before an agent's turn: no goals")
        self.census: Counter[str] = Counter(dialogues=len(records))
        self.census["left out: no turn after the customer's first words"] = len(records) - len(people)
        self._goals: dict[str, list[Goal]] = {name: [] for name in SPLITS}
        self._cases: dict[str, Case] = {}
        self._pools: dict[str, Pool] = defaultdict(Pool)
        self._everyone = Pool()
        self._spoken: dict[str, list[Line]] = defaultdict(list)
        train = [one for one in people if split[one.id] == "train"]
        self._procedures = {
            name: write_procedure(flow, manual, [one for one in train if one.goal["flow"] == name])
            for name, flow in manual.flows.items()
        }
        records_by_id = {record.id: record for record in records}
        for one in people:
            self._add(one, records_by_id[one.id], manual)

    @classmethod
    def load(cls, data: str | None) -> Abcd:
        """Read upstream's data folder; see ``abcd_reader`` for its layout and errors."""
        return cls(*read(data))

    def goals(self, split: str) -> Sequence[Goal]:
        """One goal per dialogue, in file order."""
        return self._goals[split]

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """The flow's actions, the questions for what they take, a reply, anything else, and the goodbye."""
        return self._procedure(goal).strategies

    def procedures(self) -> Mapping[str, Procedure]:
        """One for each flow."""
        return {flow: Procedure(own.strategies, own.sop) for flow, own in self._procedures.items()}

    def human(self, goal: Goal) -> Sequence[HumanTurn]:
        """The agent's clicks and words."""
        return self.case(goal).human.turns

    def case(self, goal: Goal) -> Case:
        """The human dialogue behind ``goal``, and what it takes.

        Raises:
            ConfigError: ``goal`` is not one of this environment's.
        """
        case = self._cases.get(goal.id)
        if case is None:
            raise ConfigError(f"abcd: goal {goal.id!r} is not in the loaded data; take goals from goals(split)")
        return case

    def start(self, goal: Goal, seed: int) -> Dialogue:
        """A fresh dialogue.

        Raises:
            ConfigError: ``goal`` is not one of this environment's.
        """
        case = self.case(goal)
        pool, key = self._pools[goal.intent], f"{goal.id}/{seed}"
        user = ReplayUser(case.said, pool, self._everyone, key, asked=self._everyone)
        return AbcdDialogue(goal, case, self._procedure(goal), user, self._spoken, self.voice(goal, seed))

    def _procedure(self, goal: Goal) -> FlowProcedure:
        """That of the flow in the intent: a goal from a log has no ``data``."""
        return self._procedures[goal.intent.partition("/")[0]]

    def _add(self, one: HumanDialogue, record: Record, manual: Manual) -> None:
        case = _case(one, record, manual)
        goal = _goal(case, record, manual)
        self.census[f"goals: {goal.split}"] += 1
        self._goals[goal.split].append(goal)
        self._cases[goal.id] = case
        if goal.split == "heldout":  # the held-out users' words are seen in their own dialogue only
            return
        entered = [(action, value) for action, value in _entered(record)]
        values = [*case.values.items(), *entered]
        for said in case.said:
            # A longer story, or the answer to a reply, belongs to its teller.
            if said.after.startswith(ASK) or (len(said.text.split()) <= SHORT and said.after != REPLY):
                self._pools[goal.intent].add(said, values)
                self._everyone.add(said, values)
        for event in record.events:
            # Another system line that hides what was entered would speak of another customer's case.
            returns = manual.kinds.get(event.action) == "kb_query"
            if event.action and (returns or all(mentions(event.text, value) for value in event.values)):
                self._spoken[event.action].append(line(event.text, values))


def _entered(record: Record) -> list[tuple[str, str]]:
    """(action, value) of what the agent typed and the scenario does not say."""
    known = {value.casefold() for value in record.values.values()}
    return [(e.action, v) for e in record.events for v in e.values if e.action and v.casefold() not in known]


def _case(one: HumanDialogue, record: Record, manual: Manual) -> Case:
    flow = manual.flows[record.flow]
    done, optional = [turn.strategy for turn in one.turns], flow.optional[record.subflow]
    required = [action for action in flow.required[record.subflow] if action in done or action not in optional]
    if optional.issuperset(required):  # "choose these in any order"
        required = sorted(required, key=done.index) or list(flow.required[record.subflow])
    texts = [*(turn.user for turn in one.turns), one.last]
    needs = {action: _needs(action, record, manual, texts) for action in manual.slots}
    needs = {action: slots for action, slots in needs.items() if slots and (action in LOOKUPS or action in required)}
    tells: list[set[str]] = [set() for _ in texts]
    values = dict(record.values)
    for action, slots in needs.items():
        values.update(slots)
        for slot, value in slots.items():
            where = [i for i, text in enumerate(texts) if mentions(text, value)]
            answers = [i + 1 for i, turn in enumerate(one.turns) if turn.strategy == ASK + action and texts[i + 1]]
            if where or answers:
                tells[where[0] if where else answers[-1]].add(slot)
    said = [
        Said(text, turn.strategy, index, frozenset(told))
        for index, (text, told, turn) in enumerate(zip(texts[1:], tells[1:], one.turns, strict=True))
    ]
    queries = frozenset(action for action, kind in manual.kinds.items() if kind == "kb_query")
    spoken = tuple(s for s in said if s.text)
    return Case(one, tuple(required), needs, values, frozenset(tells[0]), spoken, queries, _answer(one))


def _answer(one: HumanDialogue) -> str:
    """The FAQ's answer: the data holds it only in the agent's words after the search, in those that state a value, else
    in the longest."""
    names = [turn.strategy for turn in one.turns]
    start = next((i for i, name in enumerate(names) if name.startswith("search-") and name != "search-faq"), len(names))
    words = [turn.reply for turn in one.turns[start:] if turn.strategy not in (BYE, MORE)]
    told = [text for text in dict.fromkeys(words) if stated(text)]
    return " ".join(told) or max(words, key=len, default="")


def _needs(action: str, record: Record, manual: Manual, texts: Sequence[str]) -> dict[str, str]:
    """What ``action`` takes of the customer: slot -> value.

    A lookup takes what the human agent entered, else what its slots name in the scenario (to find an account one of
    them is enough). Another action takes what the agent entered, as far as the customer said it.
    """
    entered = [value.casefold() for event in record.events if event.action == action for value in event.values]
    if action in LOOKUPS:
        own = {slot: value for slot, value in record.values.items() if value.casefold() in entered}
        named = {slot: record.values[slot] for slot in manual.slots[action] if slot in record.values}
        found = own or named
        return dict([*found.items()][:1]) if action == "pull-up-account" else found
    if not manual.slots[action]:  # a button: whatever was typed beside it answers no question
        return {}
    said = [value for value in dict.fromkeys(entered) if any(mentions(text, value) for text in texts)]
    known = {value.casefold(): slot for slot, value in record.values.items()}
    other = [f"{manual.slots[action][0]}{f' {index + 1}' if index else ''}" for index in range(len(said))]
    return {known.get(value, name): value for name, value in zip(other, said, strict=True)}


def _goal(case: Case, record: Record, manual: Manual) -> Goal:
    flow = manual.flows[record.flow]
    return Goal(
        id=f"abcd-{record.id}",
        intent=f"{record.flow}/{record.subflow}",
        context=_context(flow),
        subgoals=_subgoals(case),
        facts={slot: value for slots in case.needs.values() for slot, value in slots.items()},
        persona={"patience": PATIENCE},
        data={"dialogue": record.id},
        split=record.split,
    )


def _context(flow: Flow) -> str:
    """The department and its guidelines: what an agent has on the screen, whatever this customer wants."""
    usual = [
        f"{flow.titles[subflow]}: {', '.join(action.replace('-', ' ') for action in actions)}."
        for subflow, actions in flow.required.items()
    ]
    about = f"Department: {flow.id.replace('_', ' ')} ({flow.description}). Find out which of these the customer needs;"
    return "\n".join(["You chat with customers of an online shop.", f"{about} the usual actions, in order:", *usual])


def _subgoals(case: Case) -> dict[str, float]:
    """Values to learn, actions to take, and the goodbye; the weights sum to 1."""
    slots = dict.fromkeys(s for a in case.required for s in case.needs.get(a, ()) if s not in case.told)
    for_actions = ACTIONS_WEIGHT if slots else ASKS_WEIGHT + ACTIONS_WEIGHT
    weights = {f"slot:{slot}": ASKS_WEIGHT / len(slots) for slot in slots}
    weights |= {f"do:{action}": for_actions / len(case.required) for action in case.required}
    return {**weights, f"close:{BYE}": CLOSE_WEIGHT}
