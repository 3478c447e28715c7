"""STAR's human dialogues as logs, in the goals, strategies, briefings and engagement scale of the environment ``star``.

Goals have the environment's ids, so a human row pairs with a policy's row goal by goal. Left out, as there: dialogues
without a query result. Ours, not STAR's: a subgoal is completed by the wizard turn after
which the customer told the slot, by the first report under the result it belongs to, and by a goodbye after the last
result. A check that the environment requires but the wizard skipped stays open. An outcome is completed by the last
turn that told the customer good news about it, if no bad news came after (``envs/star_outcome.py``).

A log judges an outcome by what the customer was told in the whole dialogue, the environment by the tool's results in
the rounds that the goal keeps: a wizard who confirmed a booking that no query made has the outcome in the log alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.envs.star_dialogue import brief
from openrlhf_gopo.envs.star_outcome import news, standing
from openrlhf_gopo.envs.star_reader import Event
from openrlhf_gopo.envs.star_script import Beat, Script, after_check, report_ids
from openrlhf_gopo.envs.star_sop import HELLO, Manual, Result, phase, status
from openrlhf_gopo.logs import human
from openrlhf_gopo.logs.human import Step


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record per goal of the environment; the folder is a clone of the STAR repository.

    Raises:
        DataError: the folder or a record in it is malformed.
    """
    env = Star.load(str(folder))
    return human.records(env, env.census, folder, lambda goal: _steps(*env.script(goal)))


def _steps(script: Script, manual: Manual) -> Iterator[Step]:
    tells = iter(script.said)
    user = script.opening.text
    seen = list(_seen(script, manual))
    told = [news(manual, beat.label, *of[:2]) for beat, of in zip(script.beats, seen, strict=True)]
    outcomes = standing(told)
    for index, (beat, (_, _, item)) in enumerate(zip(script.beats, seen, strict=True)):
        slots = next(tells).tells if beat.user else frozenset()
        yield Step(
            user=user,
            strategy=beat.label,
            reply=beat.text,
            briefing=brief(manual, beat.label, _shown(item, beat.text)) if beat.label else "",
            reached=[
                *(f"slot:{slot}" for slot in sorted(slots)),
                *_reached(beat, script, manual),
                *outcomes.get(index, ()),
            ],
            required=index == 0 and beat.label == HELLO,
            answered=bool(beat.user),
        )
        user = beat.user


def _seen(script: Script, manual: Manual) -> Iterator[tuple[Result | None, bool, Mapping[str, Any] | None]]:
    """For every wizard turn: how the tool's latest result came out, whether it is new since the turn before, its item.

    (None, False, None) before the first result.
    """
    query: Event | None = None
    result: Result | None = None
    item: Mapping[str, Any] | None = None
    fresh = False
    earlier: list[tuple[str, str, Mapping[str, Any]]] = []
    for event in script.record.events:
        if event.kind == "query":
            query = event
        elif event.kind == "result":
            item = event.values
            if query is not None:
                result, fresh = (phase(query, manual.task), status(item)), True
                item = after_check(item, result[0], query.values, earlier)
                earlier.append((*result, event.values))
        elif event.kind == "wizard":
            yield result, fresh, item
            fresh = False


def _reached(beat: Beat, script: Script, manual: Manual) -> list[str]:
    """The report subgoal that a wizard turn completes, or the closing one; [] for most turns."""
    if beat.label == BYE:
        return [f"close:{BYE}"] if beat.segment >= len(script.rounds) else []
    if not 0 < beat.segment <= len(script.rounds):
        return []
    current, ids = script.rounds[beat.segment - 1], report_ids(script, beat.segment - 1)
    if not current.reports:
        return ids if beat.label in ("", *manual.closers[current.result]) else []
    return [name for name, label in zip(ids, current.reports, strict=True) if label == beat.label]


def _shown(item: Mapping[str, Any] | None, reply: str) -> dict[str, str] | None:
    """The tool's values as the environment shows them; of a list (directions) the step that the wizard gave."""
    return None if item is None else {key: _text(key, value, reply) for key, value in item.items()}


def _text(key: str, value: Any, reply: str) -> str:
    if isinstance(value, list) and not key.casefold().endswith("instructions"):
        return ", ".join(map(str, value))
    if isinstance(value, list):
        return next((str(step) for step in value if str(step).rstrip(".") in reply), str(value[0]) if value else "")
    return "" if value is None else str(value)
