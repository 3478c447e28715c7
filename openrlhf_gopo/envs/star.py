"""The environment ``star``: 21 tasks of STAR (arXiv 2010.11853, MIT), real human dialogues replayed as the user.

One goal is one human dialogue, over one task or over several that one wizard served. The agent asks for the slots that
a task's API needs, queries, reports what the tool returned to this dialogue's wizard, perhaps several times as the user
changes their mind or the subject, and says goodbye. The user's words come from ``users/replay.py``; the procedure from
``star_sop.py``, and from ``star_several.py`` for several tasks, open in the order in which the human turned to them.

A goal succeeds when everything that its human wizard found out and reported was found out and reported, and it is what
the user wanted (``star_outcome.py``). Where the human's tool refused it refuses everyone: such a goal cannot succeed,
whoever plays. ``Star.census`` counts them. What a turn achieves hangs on its strategy; whether the reply says it is for
GRE to tell.

Left out: dialogues without a single query result. Rounds beyond four (eight over several tasks), or beyond the turns
that fit, are cut from a goal. ``Star.census`` counts all of it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from openrlhf_gopo.envs.base import SPLITS, Dialogue, Environment, HumanTurn
from openrlhf_gopo.envs.reading import CLEAR, split_of
from openrlhf_gopo.envs.replayed import BYE, PATIENCE
from openrlhf_gopo.envs.star_dialogue import StarDialogue
from openrlhf_gopo.envs.star_outcome import of_rounds, outcome_ids, standing
from openrlhf_gopo.envs.star_reader import Record, Task, read
from openrlhf_gopo.envs.star_script import SEVERAL, Script, pairs, report_ids, write_script
from openrlhf_gopo.envs.star_several import combine
from openrlhf_gopo.envs.star_sop import Manual, write_manual
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.sop import Procedure
from openrlhf_gopo.types import Goal, Strategy
from openrlhf_gopo.users.replay import Pool, ReplayUser

# What the user came for weighs as much as all steps towards it.
SLOTS_WEIGHT, REPORTS_WEIGHT, OUTCOME_WEIGHT, CLOSE_WEIGHT = 0.2, 0.25, 0.5, 0.05


class Star(Environment):
    """STAR's dialogues as goals. ``census`` counts what was loaded and what was left out."""

    name = "star"
    blocking = False
    max_turns = 14
    own_user = "replay"

    def __init__(self, tasks: Mapping[str, Task], records: Sequence[Record]) -> None:
        self.census: Counter[str] = Counter(dialogues=len(records))
        self._manuals: dict[str, Manual] = {}
        self._scripts: dict[str, Script] = {}
        self._goals: dict[str, list[Goal]] = {split: [] for split in SPLITS}
        self._pools: dict[str, Pool] = defaultdict(Pool)
        self._everyone = Pool()
        groups = _by_tasks(records)
        for name in sorted({name for names in groups for name in names}):
            own = groups.get((name,), ())
            self._manuals[name] = write_manual(tasks[name], own)
            for record in own:
                self._add(record, self._manuals[name])
        for names in sorted(names for names in groups if len(names) > 1):
            self._add_several(names, groups[names])
        for intent, pool in self._pools.items():
            pool.keep_apart(self._values(intent))

    @classmethod
    def load(cls, data: str | None) -> Star:
        """Read the folder that upstream publishes; see ``star_reader`` for its layout and errors."""
        return cls(*read(data))

    def goals(self, split: str) -> Sequence[Goal]:
        """One goal per dialogue, in file order by task, those over several tasks last; a hash of the dialogue id
        decides the split."""
        return self._goals[split]

    def turn_limit(self, goal: Goal) -> int:
        """``max_turns``; twice as many for a goal over several tasks."""
        return self.max_turns * (SEVERAL if len(self.script(goal)[0].record.tasks) > 1 else 1)

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """The strategies of the goal's tasks: those its wizards can utter, its queries, and the four shared ones."""
        return self._manuals[goal.intent].strategies

    def procedures(self) -> Mapping[str, Procedure]:
        """One for each task, and one for each set of tasks that a wizard served together."""
        return {task: Procedure(manual.strategies, manual.sop) for task, manual in self._manuals.items()}

    def start(self, goal: Goal, seed: int) -> Dialogue:
        """A fresh dialogue.

        Raises:
            ConfigError: ``goal`` is not one of this environment's.
        """
        script, manual = self.script(goal)
        user = ReplayUser(script.said, self._pools[goal.intent], self._everyone, f"{goal.id}/{seed}")
        return StarDialogue(goal, script, manual, user, self.voice(goal, seed))

    def script(self, goal: Goal) -> tuple[Script, Manual]:
        """The human dialogue behind ``goal``, and the manual of its task.

        Raises:
            ConfigError: ``goal`` is not one of this environment's.
        """
        script = self._scripts.get(goal.id)
        if script is None:
            raise ConfigError(f"star: goal {goal.id!r} is not in the loaded data; take goals from goals(split)")
        return script, self._manuals[goal.intent]

    def human(self, goal: Goal) -> Sequence[HumanTurn]:
        """The wizard's utterances and queries of the rounds that the goal keeps."""
        script, manual = self.script(goal)
        turns, user, segment = list[HumanTurn](), script.opening.text, 0
        for beat in script.beats:
            for current in script.rounds[segment : beat.segment]:
                turns.append(HumanTurn(user, manual.queries[current.result[0]], "", (f"query:{current.result[1]}",)))
                user, segment = "", beat.segment
            if beat.segment <= len(script.rounds):
                turns.append(HumanTurn(user, beat.label, beat.text))
                user = beat.user
        return turns

    def _add_several(self, names: Sequence[str], records: Iterable[Record]) -> None:
        """Add the goals over ``names``. Their users may borrow what those of each of the tasks said."""
        several = combine([self._manuals[name] for name in names])
        intent = several.manual.task.id
        self._manuals[intent] = several.manual
        for goal in self._goals["train"]:
            script = self._scripts[goal.id]
            for said in script.said if goal.intent in names else ():
                self._pools[intent].add(said, several.values(goal.intent, script.values))
        for record in records:
            self._add(several.record(record), several.manual)

    def _values(self, intent: str) -> set[str]:
        """What the training users of ``intent``, or of one of its tasks, know."""
        tasks = {intent, *intent.split("+")}
        known = (self._scripts[goal.id].values for goal in self._goals["train"] if goal.intent in tasks)
        return {value for values in known for _, value in values if value.casefold() not in CLEAR}

    def _add(self, record: Record, manual: Manual) -> None:
        script = write_script(record, manual)
        kind = "over several tasks" if len(record.tasks) > 1 else "over one task"
        self.census[f"{kind}, {'happy' if record.happy else 'unhappy'}"] += script is not None
        if script is None:
            self.census["left out: no query result"] += 1
            return
        goal = _goal(script, manual, [self._manuals[name] for name in record.tasks])
        self.census[f"goals: {goal.split}"] += 1
        self.census["goals with later rounds cut"] += script.cut
        stands = {name for names in standing(of_rounds(script)).values() for name in names}
        self.census["goals that end without what the user wanted"] += not stands.issuperset(outcome_ids(script, manual))
        self._scripts[goal.id] = script
        self._goals[goal.split].append(goal)
        if goal.split == "train":  # the held-out users' words are seen in their own dialogue only
            for said in script.said:
                self._pools[goal.intent].add(said, script.values)
                if len(record.tasks) == 1:
                    self._everyone.add(said, script.values)


def _by_tasks(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.tasks].append(record)
    return groups


def _goal(script: Script, manual: Manual, parts: Sequence[Manual]) -> Goal:
    """The goal of ``script``; ``parts``: the manuals of its tasks, ``manual`` that of all of them together."""
    record = script.record
    return Goal(
        id=f"star-{record.id}",
        intent=manual.task.id,
        context=_context(record, parts),
        subgoals=_subgoals(script, manual),
        facts=pairs(script.values),
        persona={"patience": PATIENCE, "happy": record.happy},
        data={"dialogue": record.id, "human_success": record.done},
        split=split_of(record.id),
    )


def _context(record: Record, manuals: Iterable[Manual]) -> str:
    """What the wizard was told, and what the tools can be asked: nothing of the user's own task text."""
    told = " ".join(record.wizard_task.split())
    lines = [told if told.endswith(("!", "?")) else told.rstrip(".") + "."]
    for manual in manuals:
        slots = list(dict.fromkeys(manual.asks.values()))
        needed = [slot for slot in slots if slot in manual.task.required]
        other = [slot for slot in slots if slot not in needed]
        lines.append(f"Task: {manual.task.id.replace('_', ' ')}.")
        lines += [f"The tool needs: {', '.join(map(_words, needed))}."] if needed else []
        lines += [f"It also takes: {', '.join(map(_words, other))}."] if other else []
    return " ".join(lines)


def _words(slot: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", slot).lower() if not slot.isupper() else slot


def _subgoals(script: Script, manual: Manual) -> dict[str, float]:
    """Slots to learn, results to report, what the user wanted of them, and the goodbye; the weights sum to 1."""
    slots = [f"slot:{slot}" for slot in script.asked()]
    reports = [name for index in range(len(script.rounds)) for name in report_ids(script, index)]
    outcomes = outcome_ids(script, manual)
    for_reports = REPORTS_WEIGHT if slots else SLOTS_WEIGHT + REPORTS_WEIGHT
    weights = {name: SLOTS_WEIGHT / len(slots) for name in slots}
    weights |= {name: for_reports / len(reports) for name in reports}
    weights |= {name: OUTCOME_WEIGHT / len(outcomes) for name in outcomes}
    return {**weights, f"close:{BYE}": CLOSE_WEIGHT}
