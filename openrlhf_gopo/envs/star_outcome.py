"""What came of a STAR user's wish, from what they were told: was it found, and where the task books, was it booked?

Ours, not STAR's. A task has one outcome per phase of its tool (``star_sop.phase``): ``check``, and ``book`` where it
books. A phase stands when the last news about it was good: what was found may be lost again when the user changes their
mind. Only the manual, the turns and the tool's results are read, never the questionnaire.
"""

from __future__ import annotations

from collections.abc import Iterable

from openrlhf_gopo.envs.star_script import Script
from openrlhf_gopo.envs.star_sop import Manual, Result

News = tuple[str, bool]  # phase, and whether it came out as the user wished


def outcome_ids(script: Script, manual: Manual) -> list[str]:
    """The outcome subgoals: of every phase of every task that a round of ``script`` belongs to.

    Where later rounds were cut from the goal, phases that only those had are cut too.
    """
    phases = {current.result[0] for current in script.rounds}
    tasks = {_task(phase) for phase in phases}
    return [f"outcome:{p}" for p in manual.queries if p in phases or (_task(p) in tasks and not script.cut)]


def of_rounds(script: Script) -> list[News]:
    """The news of each round: what its result says."""
    return [(current.result[0], current.result[1] == "ok") for current in script.rounds]


def news(manual: Manual, label: str, result: Result | None, fresh: bool) -> News | None:
    """What a wizard turn told the user about a phase; None for most turns.

    A report that follows good results alone, or bad ones alone, says which by itself, even if the wizard did not ask
    the tool. Any other report says what the latest ``result`` says, and so does an unlabelled turn right after it
    (``fresh``).
    """
    after = manual.reports.get(label, frozenset())
    phases = {phase for phase, _ in after}
    verdicts = {status == "ok" for _, status in after}
    if len(verdicts) == 1:
        return (result[0] if result and result[0] in phases else max(phases)), verdicts.pop()  # "check" > "book"
    if result and (result[0] in phases or (fresh and not label)):
        return result[0], result[1] == "ok"
    return None


def standing(told: Iterable[News | None]) -> dict[int, list[str]]:
    """The outcome subgoals that hold after all of ``told``, by the index of the news that completed each.

    A booking takes its check with it; a check that fails takes back the booking, as the user turned to something else.
    The last good news counts: an earlier one answered a wish that the user gave up.
    """
    stands: dict[str, int] = {}
    for index, item in enumerate(told):
        if item is None:
            continue
        phase, good = item
        if not good:
            stands.pop(phase, None)
            stands.pop(phase.removesuffix("check") + "book", None)
            continue
        stands[phase] = index
        if phase.endswith("book"):
            stands.setdefault(phase.removesuffix("book") + "check", index)
    found: dict[int, list[str]] = {}
    for phase, index in stands.items():
        found.setdefault(index, []).append(f"outcome:{phase}")
    return found


def _task(phase: str) -> str:
    """The task in the phase of a query of several tasks (``task:check``), else ""."""
    return phase.rpartition(":")[0]
