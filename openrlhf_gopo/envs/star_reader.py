"""Reads STAR (arXiv 2010.11853, MIT) in the layout its authors publish. Knows files and fields, no dialogue logic.

tasks/<task>/<task>.json      {"replies": {label: template}, "graph": {label: next label}}
tasks/<task>/responses.json   {label: template}
apis/apis/<task>.json         {"input": [{"Name": slot}], "required": [slot]}
dialogues/*.json              one dialogue per file; or dialogues*.jsonl, one per line
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.reading import as_object, folder, get, parse, shorten
from openrlhf_gopo.errors import DataError

LAYOUT = "point --gopo.data at a clone of the STAR repository: the folder that holds tasks/, apis/ and dialogues"
# Questions of the questionnaire about manners, fun and a detail; each other one asks whether the task was done.
ASIDE = re.compile(r"calm and helpful|enjoy this|about rain")
VIDEO_HINT = re.compile(r"\s*\([^()]*https?://[^()]*\)|https?://\S+")


@dataclass(frozen=True)
class Task:
    """One task: reply templates by label, the graph over labels, and the slots of its API (all, and required)."""

    id: str
    replies: Mapping[str, str]
    written: frozenset[str]  # the labels of responses.json: what a wizard can say for certain
    graph: Mapping[str, str]
    inputs: tuple[str, ...]
    required: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """``kind`` is user, wizard, query or result; ``values`` are a query's constraints or a result's item.

    ``label``: a wizard turn's, as in the data; a query's is its phase where ``star_several`` names it. ``api``: the
    task whose tool a query asks.
    """

    kind: str
    text: str = ""
    label: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    api: str = ""


@dataclass(frozen=True)
class Record:
    """One human dialogue. ``user_task`` is hidden from the agent; ``answers`` are the user's verdicts by question."""

    id: str
    tasks: tuple[str, ...]
    wizard_task: str
    user_task: str
    happy: bool
    answers: Mapping[str, bool]
    events: tuple[Event, ...]

    @property
    def done(self) -> bool | None:
        """The user's own answer whether the task was done; None when they were not asked."""
        verdicts = [answer for question, answer in self.answers.items() if not ASIDE.search(question)]
        return all(verdicts) if verdicts else None


def read(data: str | None) -> tuple[dict[str, Task], list[Record]]:
    """The tasks by id and the dialogues in file order.

    Raises:
        ConfigError: ``data`` is None.
        DataError: the folder or a part of it is missing, or a record is malformed; names file, line and field.
    """
    root = folder("star", data, LAYOUT)
    tasks = {task.id: task for task in _tasks(root)}
    if not tasks:
        raise DataError(f"--gopo.data {data}: no tasks/<task>/<task>.json in it; {LAYOUT}")
    records = [_record(value, where, tasks) for value, where in _documents(root)]
    if not records:
        raise DataError(f"--gopo.data {data}: neither dialogues/*.json nor dialogues*.jsonl in it; {LAYOUT}")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(f"--gopo.data {data}: DialogueID {record.id} occurs twice; keep one of the two records")
        seen.add(record.id)
    return tasks, records


def _tasks(root: Path) -> Iterator[Task]:
    for path in sorted(root.glob("tasks/*/*.json")):
        if path.name == "responses.json":
            continue
        task = _object(path)
        responses = _object(path.with_name("responses.json"))
        api_path = root / "apis" / "apis" / path.name
        api = _object(api_path)
        where = f"{api_path}:1"
        replies = {
            **_strings(task, "replies", f"{path}:1"),
            **_texts(responses, f"{path.with_name('responses.json')}:1"),
        }
        yield Task(
            id=path.stem,
            replies=replies,
            written=frozenset(responses),
            graph=_strings(task, "graph", f"{path}:1"),
            inputs=tuple(str(get(slot, "Name", str, where)) for slot in get(api, "input", list, where)),
            required=tuple(str(slot) for slot in get(api, "required", list, where)),
        )


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {LAYOUT}")
    return as_object(parse(path.read_bytes(), str(path)), str(path))


def _documents(root: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every dialogue with its ``file:line``."""
    for path in sorted(root.glob("dialogues/*.json"), key=lambda p: (len(p.name), p.name)):
        yield _object(path), f"{path}:1"
    for path in sorted(root.glob("dialogues*.jsonl")):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield as_object(parse(line.rstrip(), str(path), number), str(path), number), f"{path}:{number}"


def _strings(record: dict[str, Any], key: str, where: str) -> dict[str, str]:
    return _texts(get(record, key, dict, where), where, f"{key}.")


def _texts(values: dict[str, Any], where: str, prefix: str = "") -> dict[str, str]:
    return {key: get(values, key, str, where, prefix) for key in values}


def _record(value: dict[str, Any], where: str, tasks: Mapping[str, Task]) -> Record:
    scenario = get(value, "Scenario", dict, where)
    names: list[str] = []
    for index, capability in enumerate(get(scenario, "WizardCapabilities", list, where, "Scenario.")):
        prefix = f"Scenario.WizardCapabilities[{index}]."
        names.append(get(capability, "Task", str, where, prefix))
        if names[-1] not in tasks:
            raise DataError(f"{where}:{prefix}Task: {names[-1]!r} has no folder in tasks/; restore it")
    if not names:
        raise DataError(f"{where}:Scenario.WizardCapabilities: expected at least one task, got none")
    names = list(dict.fromkeys(names))
    answers = get(value, "UserQuestionnaire", list, where) if value.get("UserQuestionnaire") else []
    return Record(
        id=str(get(value, "DialogueID", (int, str), where)),
        tasks=tuple(names),
        wizard_task=VIDEO_HINT.sub("", get(scenario, "WizardTask", str, where, "Scenario.")).strip(),
        user_task=get(scenario, "UserTask", str, where, "Scenario."),
        happy=get(scenario, "Happy", bool, where, "Scenario."),
        answers={str(a.get("Question", "")): bool(a.get("Answer")) for a in answers if isinstance(a, dict)},
        events=tuple(_events(get(value, "Events", list, where), where, names)),
    )


def _events(events: list[Any], where: str, tasks: Sequence[str]) -> Iterator[Event]:
    """The events of a dialogue that say or find something; suggestions, instructions and selections are skipped."""
    for index, event in enumerate(events):
        prefix = f"Events[{index}]."
        agent = get(event, "Agent", str, where, prefix)
        action = get(event, "Action", str, where, prefix)
        if action in ("utter", "pick_suggestion") and agent in ("User", "Wizard"):
            text = get(event, "Text", str, where, prefix)
            yield Event(agent.lower(), shorten(text), str(event.get("ActionLabel") or ""))
        elif action == "query":
            values: dict[str, str] = {}
            for constraint in get(event, "Constraints", list, where, prefix):
                if not isinstance(constraint, dict):
                    raise DataError(f"{where}:{prefix}Constraints: expected objects, got {constraint!r}")
                values |= {slot: plain(str(value)) for slot, value in constraint.items()}
            api = get(event, "APIName", str, where, prefix) if len(tasks) > 1 else tasks[0]
            if api not in tasks:
                raise DataError(f"{where}:{prefix}APIName: {api!r} is none of the wizard's tasks: {', '.join(tasks)}")
            yield Event("query", values={slot: value for slot, value in values.items() if value}, api=api)
        elif action == "return_item":
            item = event.get("Item") or {}
            if not isinstance(item, dict):
                raise DataError(f"{where}:{prefix}Item: expected dict, got {item!r}; restore the record")
            yield Event("result", values={key: value for key, value in item.items() if key != "APIName"})


def plain(constraint: str) -> str:
    """The value in a constraint: ``api.is_equal_to("Chicago")``, ``"Chicago"`` and ``Chicago`` are all Chicago."""
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', constraint)
    if quoted:
        return ", ".join(part.strip() for part in quoted)
    return re.sub(r"^api\.\w+\((.*)\)$", r"\1", constraint.strip()).strip(" '")
