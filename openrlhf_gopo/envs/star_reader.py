"""Reads STAR (arXiv 2010.11853, MIT) in the layout its authors publish. Knows files and fields, no dialogue logic.

tasks/<task>/<task>.json      {"replies": {label: template}, "graph": {label: next label}}
tasks/<task>/responses.json   {label: template}
apis/apis/<task>.json         {"input": [{"Name": slot}], "required": [slot]}
dialogues/*.json              one dialogue per file; or dialogues*.jsonl, one per line
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_gopo.errors import ConfigError, DataError

MAX_WORDS = 60  # of one replayed utterance: the reader keeps a verbatim prefix
LAYOUT = "point --gopo.data at a clone of the STAR repository: the folder that holds tasks/, apis/ and dialogues"
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
    """``kind`` is user, wizard, query or result; ``values`` are a query's constraints or a result's item."""

    kind: str
    text: str = ""
    label: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


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


def read(data: str | None) -> tuple[dict[str, Task], list[Record]]:
    """The tasks by id and the dialogues in file order.

    Raises:
        ConfigError: ``data`` is None.
        DataError: the folder or a part of it is missing, or a record is malformed; names file, line and field.
    """
    if data is None:
        raise ConfigError(f"--gopo.data None: the environment star needs its data; {LAYOUT}")
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"--gopo.data {data}: no such folder; {LAYOUT}")
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
            inputs=tuple(str(_get(slot, "Name", str, where)) for slot in _get(api, "input", list, where)),
            required=tuple(str(slot) for slot in _get(api, "required", list, where)),
        )


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {LAYOUT}")
    return _parse(path.read_bytes(), str(path), 1)


def _documents(root: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every dialogue with its ``file:line``."""
    for path in sorted(root.glob("dialogues/*.json"), key=lambda p: (len(p.name), p.name)):
        yield _object(path), f"{path}:1"
    for path in sorted(root.glob("dialogues*.jsonl")):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line.rstrip(), str(path), number), f"{path}:{number}"


def _parse(text: bytes, path: str, first_line: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}:column {error.colno}: not JSON ({error.msg}); restore the file") from error
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}:byte {error.start}: not UTF-8 ({error.reason}); restore the file") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{first_line}: expected a JSON object, got {type(value).__name__}")
    return value


def _get(record: Any, key: str, kind: type | tuple[type, ...], where: str, prefix: str = "") -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}:{prefix}{key}: expected {expected}, got {value!r}; restore the record")
    return value


def _strings(record: dict[str, Any], key: str, where: str) -> dict[str, str]:
    return _texts(_get(record, key, dict, where), where, f"{key}.")


def _texts(values: dict[str, Any], where: str, prefix: str = "") -> dict[str, str]:
    return {key: _get(values, key, str, where, prefix) for key in values}


def _record(value: dict[str, Any], where: str, tasks: Mapping[str, Task]) -> Record:
    scenario = _get(value, "Scenario", dict, where)
    names: list[str] = []
    for index, capability in enumerate(_get(scenario, "WizardCapabilities", list, where, "Scenario.")):
        prefix = f"Scenario.WizardCapabilities[{index}]."
        names.append(_get(capability, "Task", str, where, prefix))
        if names[-1] not in tasks:
            raise DataError(f"{where}:{prefix}Task: {names[-1]!r} has no folder in tasks/; restore it")
    if not names:
        raise DataError(f"{where}:Scenario.WizardCapabilities: expected at least one task, got none")
    answers = value.get("UserQuestionnaire") or []
    return Record(
        id=str(_get(value, "DialogueID", (int, str), where)),
        tasks=tuple(names),
        wizard_task=VIDEO_HINT.sub("", _get(scenario, "WizardTask", str, where, "Scenario.")).strip(),
        user_task=_get(scenario, "UserTask", str, where, "Scenario."),
        happy=_get(scenario, "Happy", bool, where, "Scenario."),
        answers={str(a.get("Question", "")): bool(a.get("Answer")) for a in answers if isinstance(a, dict)},
        events=tuple(_events(_get(value, "Events", list, where), where)),
    )


def _events(events: list[Any], where: str) -> Iterator[Event]:
    """The events of a dialogue that say or find something; suggestions, instructions and selections are skipped."""
    for index, event in enumerate(events):
        prefix = f"Events[{index}]."
        agent = _get(event, "Agent", str, where, prefix)
        action = _get(event, "Action", str, where, prefix)
        if action in ("utter", "pick_suggestion") and agent in ("User", "Wizard"):
            text = _get(event, "Text", str, where, prefix)
            yield Event(agent.lower(), shorten(text), str(event.get("ActionLabel") or ""))
        elif action == "query":
            values: dict[str, str] = {}
            for constraint in _get(event, "Constraints", list, where, prefix):
                if not isinstance(constraint, dict):
                    raise DataError(f"{where}:{prefix}Constraints: expected objects, got {constraint!r}")
                values |= {slot: plain(str(value)) for slot, value in constraint.items()}
            yield Event("query", values={slot: value for slot, value in values.items() if value})
        elif action == "return_item":
            item = event.get("Item") or {}
            if not isinstance(item, dict):
                raise DataError(f"{where}:{prefix}Item: expected dict, got {item!r}; restore the record")
            yield Event("result", values={key: value for key, value in item.items() if key != "APIName"})


def shorten(text: str) -> str:
    """The first ``MAX_WORDS`` words of ``text``, verbatim."""
    words = list(re.finditer(r"\S+", text))
    return text.strip() if len(words) <= MAX_WORDS else text[words[0].start() : words[MAX_WORDS - 1].end()]


def plain(constraint: str) -> str:
    """The value in a constraint: ``api.is_equal_to("Chicago")``, ``"Chicago"`` and ``Chicago`` are all Chicago."""
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', constraint)
    if quoted:
        return ", ".join(part.strip() for part in quoted)
    return re.sub(r"^api\.\w+\((.*)\)$", r"\1", constraint.strip()).strip(" '")
