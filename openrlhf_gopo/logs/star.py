"""STAR's human dialogues as logs, in the goals, strategies, briefings and engagement scale of the environment ``star``.

Goals have the environment's ids, so a human row pairs with a policy's row goal by goal. Left out, as there: dialogues
without a query result. Ours, not STAR's: a subgoal is completed by the wizard turn after
which the customer told the slot, by the first report under the result it belongs to, and by a goodbye after the last
result. A check that the environment requires but the wizard skipped stays open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.envs.star_dialogue import brief
from openrlhf_gopo.envs.star_script import Beat, Script, report_ids
from openrlhf_gopo.envs.star_sop import HELLO, Manual
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
    for index, (beat, item) in enumerate(zip(script.beats, _items(script), strict=True)):
        told = next(tells).tells if beat.user else frozenset()
        yield Step(
            user=user,
            strategy=beat.label,
            reply=beat.text,
            briefing=brief(manual, beat.label, _shown(item, beat.text)) if beat.label else "",
            reached=[f"slot:{slot}" for slot in sorted(told)] + _reached(beat, script, manual),
            required=index == 0 and beat.label == HELLO,
            answered=bool(beat.user),
        )
        user = beat.user


def _items(script: Script) -> Iterator[Mapping[str, Any] | None]:
    """For every wizard turn, what the tool had returned last; None before the first result."""
    latest: Mapping[str, Any] | None = None
    for event in script.record.events:
        if event.kind == "result":
            latest = event.values
        elif event.kind == "wizard":
            yield latest


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
    return None if item is None else {key: _step(value, reply) for key, value in item.items()}


def _step(value: Any, reply: str) -> str:
    if isinstance(value, list):
        return next((str(step) for step in value if str(step).rstrip(".") in reply), str(value[0]) if value else "")
    return "" if value is None else str(value)
