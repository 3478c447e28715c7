"""What a set of dialogues achieved: means with 95% bootstrap intervals over goals, pass^k, and slices.

The unit is the goal: samples of one goal share its difficulty, so resampling dialogues would make intervals too narrow.
Every goal counts the same, however many of its samples survived.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openrlhf_gopo.types import StopReason, Trajectory

RESAMPLES = 2000
BLOCK = 1 << 22  # draws at a time
MAX_SLICE_VALUES = 12  # a persona key with more values than this gives no useful slices


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
    reason among the ``dialogues`` that did not fail. ``by_goal`` maps metric to goal id to that goal's mean,
    ``intents`` the id of every goal to its intent. ``pass_2``, ``pass_4``, ... are pass^k over the goals with at least
    that many samples; pass^1 is ``success``.
    """

    metrics: dict[str, Interval]
    stops: dict[str, float]
    goals: int
    dialogues: int
    failures: int
    by_goal: dict[str, dict[str, float]]
    intents: dict[str, str]


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
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    rows = max(BLOCK // array.size, 1)  # all at once would take 12 bytes a draw, 24 GB for a million goals
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), array.size)
        means[start : start + rows] = array[rng.integers(0, array.size, size=size, dtype=np.int32)].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean, float(low), float(high), array.size)


def summarise(
    trajectories: Iterable[Trajectory],
    resamples: int = RESAMPLES,
    seed: int = 0,
    metrics: Collection[str] | None = None,
) -> Summary:
    """Summarise scored dialogues, in ``metrics`` only if given. What no dialogue carries is absent, not zero."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stops: Counter[str] = Counter()
    intents: dict[str, str] = {}
    failures = 0
    for trajectory in trajectories:
        if trajectory.stop is StopReason.FAILED:
            failures += 1
            continue
        stops[trajectory.stop.value] += 1
        intents[trajectory.goal.id] = trajectory.goal.intent
        for metric, value in metric_values(trajectory).items():
            samples[metric][trajectory.goal.id].append(value)
    by_goal = {
        metric: {goal: sum(values) / len(values) for goal, values in per_goal.items()}
        for metric, per_goal in samples.items()
    }
    by_goal |= _passes(samples["success"])
    if metrics is not None:
        by_goal = {metric: means for metric, means in by_goal.items() if metric in metrics}
    dialogues = stops.total()
    return Summary(
        metrics={metric: bootstrap(list(means.values()), resamples, seed) for metric, means in by_goal.items()},
        stops={reason.value: stops[reason.value] / dialogues for reason in StopReason if stops[reason.value]},
        goals=len(intents),
        dialogues=dialogues,
        failures=failures,
        by_goal=by_goal,
        intents=intents,
    )


def _passes(successes: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """``pass_k`` of each goal, for k = 2, 4, 8, ... up to the most samples of a goal; 1.0 is a success."""
    most = max(map(len, successes.values()), default=0)
    return {
        f"pass_{k}": {g: pass_power(v.count(1.0), len(v), k) for g, v in successes.items() if len(v) >= k}
        for k in (2**power for power in range(1, most.bit_length()))
    }


def pass_power(successes: int, samples: int, k: int) -> float:
    """tau-bench's pass^k (arXiv 2406.12045) of one goal: the chance that k dialogues about it all succeed.

    C(c, k) / C(n, k) is its unbiased estimate from c successes among n samples: the share of the subsets of k samples
    that hold successes only. Two successes among four: of the six pairs, one.

    >>> pass_power(2, 4, k=1), round(pass_power(2, 4, k=2), 4), pass_power(2, 4, k=3)
    (0.5, 0.1667, 0.0)

    Raises:
        ValueError: not 0 <= successes <= samples, or k is not in 1..samples, where there is no estimate.
    """
    if not 0 <= successes <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass^{k} of {successes} successes in {samples} samples: k must be in 1..samples")
    return math.comb(successes, k) / math.comb(samples, k)


def slices(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Group dialogues by task (``intent: ...``), user simulator (``user: ...``) where there is more than one, each
    persona trait (``persona key: value``), all sorted by name, and length (``length: 5-8 turns``), shortest first.

    Persona keys with fractions among their values, or more than ``MAX_SLICE_VALUES`` values, are left out. Length is
    the number of turns that the dialogue took: unlike the others it is a result of the policy, so the dialogues of one
    goal may fall into several of its slices, and those that failed, cut off anywhere, fall into none.
    """
    groups: dict[str, dict[str, list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    lengths: dict[int, list[Trajectory]] = defaultdict(list)
    continuous = set()
    for trajectory in trajectories:
        groups["intent"][f"intent: {trajectory.goal.intent}"].append(trajectory)
        if trajectory.user:
            groups["user"][f"user: {trajectory.user}"].append(trajectory)
        for key, value in trajectory.goal.persona.items():
            groups[f"persona {key}"][f"persona {key}: {value}"].append(trajectory)
            if isinstance(value, float) and not value.is_integer():
                continuous.add(f"persona {key}")
        if trajectory.turns and trajectory.stop is not StopReason.FAILED:
            lengths[(len(trajectory.turns) - 1).bit_length()].append(trajectory)
    if len(groups["user"]) == 1:
        del groups["user"]
    large = {key for key, group in groups.items() if key != "intent" and len(group) > MAX_SLICE_VALUES}
    kept = (group for key, group in groups.items() if key not in large | continuous)
    found = {name: members for group in kept for name, members in sorted(group.items())}
    return found | {f"length: {_turns(power)}": members for power, members in sorted(lengths.items())}


def _turns(power: int) -> str:
    """The lengths from above 2^(power-1) to 2^power turns, in words."""
    return ("1 turn", "2 turns")[power] if power < 2 else f"{2 ** (power - 1) + 1}-{2**power} turns"
