"""Means with 95% bootstrap intervals over goals, and paired differences between two policies.

The unit is the goal: samples of one goal share its difficulty, so resampling dialogues would make intervals too narrow.
Every goal counts the same, however many of its samples survived.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.types import StopReason, Trajectory

RESAMPLES = 2000
MAX_SLICE_VALUES = 12  # a persona key with more values than this (a continuous one) gives no useful slices


@dataclass(frozen=True)
class Interval:
    """Mean over ``goals`` goals with its 95% percentile-bootstrap interval; NaN bounds for a single goal."""

    mean: float
    low: float
    high: float
    goals: int

    @property
    def excludes_zero(self) -> bool:
        """True when the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Summary:
    """What a set of dialogues achieved; failed ones count in ``failures`` and nowhere else.

    ``metrics`` are in the units of ``Trajectory.rewards`` (``tse`` in [0, 100]). ``stops`` holds the share of each stop
    reason among the ``dialogues`` that did not fail. ``by_goal`` maps metric to goal id to that goal's mean.
    """

    metrics: dict[str, Interval]
    stops: dict[str, float]
    goals: int
    dialogues: int
    failures: int
    by_goal: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` over the ``goals`` both contain; ``unpaired`` goals are in one of them only."""

    metrics: dict[str, Interval]
    goals: int
    unpaired: int


def metric_values(trajectory: Trajectory) -> dict[str, float]:
    """The metrics of one dialogue: its rewards, and success, turns and engagement where no reward has that name.

    ``engagement`` is the mean over turns of a_t in [0, 1]. ``invalid`` is the share of decisions that were left
    to chance (``Turn.invalid``), absent where restricted decoding rules that out. NaN means "not measured here" and is
    left out.
    """
    turns = trajectory.turns
    values = {"success": float(trajectory.success), "turns": float(len(turns))}
    if turns:
        values["engagement"] = sum(turn.engagement for turn in turns) / len(turns)
    free = [turn.invalid for turn in turns if turn.invalid is not None]
    if free:
        values["invalid"] = sum(free) / len(free)
    values.update({name: float(value) for name, value in trajectory.rewards.items() if value is not None})
    return {name: value for name, value in values.items() if not math.isnan(value)}


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one value per goal, with the 2.5th and 97.5th percentile of the means of ``resamples`` resamples.

    Raises:
        ValueError: ``values`` is empty.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("bootstrap needs at least one value")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    draws = np.random.default_rng(seed).integers(0, array.size, size=(resamples, array.size), dtype=np.int32)
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return Interval(mean, float(low), float(high), array.size)


def summarise(trajectories: Iterable[Trajectory], resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Summarise scored dialogues. A metric that no dialogue carries is absent, not zero."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stops: Counter[str] = Counter()
    goals: set[str] = set()
    failures = 0
    for trajectory in trajectories:
        if trajectory.stop is StopReason.FAILED:
            failures += 1
            continue
        stops[trajectory.stop.value] += 1
        goals.add(trajectory.goal.id)
        for metric, value in metric_values(trajectory).items():
            samples[metric][trajectory.goal.id].append(value)
    by_goal = {
        metric: {goal: sum(values) / len(values) for goal, values in per_goal.items()}
        for metric, per_goal in samples.items()
    }
    dialogues = stops.total()
    return Summary(
        metrics={metric: bootstrap(list(means.values()), resamples, seed) for metric, means in by_goal.items()},
        stops={reason.value: stops[reason.value] / dialogues for reason in StopReason if stops[reason.value]},
        goals=len(goals),
        dialogues=dialogues,
        failures=failures,
        by_goal=by_goal,
    )


def paired_difference(before: Summary, after: Summary, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Per metric, the mean over shared goals of (after - before), with its interval over those goals.

    Raises:
        DataError: the two share no goal id, so that nothing can be paired.
    """
    metrics = {}
    for metric in (name for name in before.by_goal if name in after.by_goal):
        old, new = before.by_goal[metric], after.by_goal[metric]
        shared = [goal for goal in old if goal in new]
        if shared:
            metrics[metric] = bootstrap([new[goal] - old[goal] for goal in shared], resamples, seed)
    first, second = _goal_ids(before), _goal_ids(after)
    if not metrics:
        raise DataError(
            f"cannot pair {len(first)} goals with {len(second)}: they share no goal id; "
            "evaluate both policies on the same goals (same environment, data and split)"
        )
    return Difference(metrics, goals=len(first & second), unpaired=len(first ^ second))


def slices(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Group dialogues by task (``intent: ...``), user simulator (``user: ...``) where there is more than one, and each
    persona trait (``key: value``), sorted by name.

    Persona keys with more than ``MAX_SLICE_VALUES`` different values are left out.
    """
    groups: dict[str, dict[str, list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    for trajectory in trajectories:
        groups["intent"][f"intent: {trajectory.goal.intent}"].append(trajectory)
        if trajectory.user:
            groups["user"][f"user: {trajectory.user}"].append(trajectory)
        for key, value in trajectory.goal.persona.items():
            groups[f"persona {key}"][f"persona {key}: {value}"].append(trajectory)
    if len(groups["user"]) == 1:
        del groups["user"]
    kept = (group for key, group in groups.items() if key == "intent" or len(group) <= MAX_SLICE_VALUES)
    return {name: members for group in kept for name, members in sorted(group.items())}


def _goal_ids(summary: Summary) -> set[str]:
    per_metric: Iterable[Mapping[str, float]] = summary.by_goal.values()
    return {goal for means in per_metric for goal in means}
