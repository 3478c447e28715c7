"""Is one policy better than another? Paired differences over the goals that both played, tested and corrected.

The test is the sign-flip (paired permutation) test of the mean difference over goals, two-sided: were the policies
equal, a goal's difference would be as likely to have the other sign. Of n goals all 2^n sign patterns are counted where
these are no more than ``FLIPS``; else p = (1 + patterns at least as extreme) / (1 + FLIPS) over random patterns, which
keeps the level (Phipson and Smyth, 2010). It assumes no distribution, only goals drawn independently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.summary import RESAMPLES, Interval, Summary, bootstrap

FLIPS = 9_999
TIE = 1e-12  # relative: sums that are equal on paper differ by rounding


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` over the ``goals`` both contain; ``unpaired`` goals are in one of them only.

    ``p`` holds the p-value of each metric's difference by itself; ``p_holm`` the same, corrected for the other policies
    compared with ``before``, and empty until ``compare`` knows them.
    """

    metrics: dict[str, Interval]
    goals: int
    unpaired: int
    p: dict[str, float]
    p_holm: dict[str, float]


def compare(
    results: Mapping[str, Summary], compared: Mapping[str, str]
) -> tuple[dict[str, Difference], dict[str, str]]:
    """Each row of ``compared`` minus the one it is compared with, and why others have no difference.

    Holm-corrected per metric over the rows that are compared with the same one. Rows that cannot be paired (other
    environment, data or split) are in the second map: name to reason.
    """
    found: dict[str, Difference] = {}
    refused: dict[str, str] = {}
    for name, base in compared.items():
        try:
            found[name] = paired_difference(results[base], results[name])
        except DataError as error:
            refused[name] = f"{name} stands alone, without a difference to {base}: {error}"
    for base in dict.fromkeys(compared.values()):
        _correct({name: found[name] for name in found if compared[name] == base}, found)
    return found, refused


def _correct(family: Mapping[str, Difference], found: dict[str, Difference]) -> None:
    """Put Holm's p-values of ``family`` into ``found``, metric by metric."""
    for metric in dict.fromkeys(metric for difference in family.values() for metric in difference.p):
        measured = [name for name, difference in family.items() if metric in difference.p]
        for name, p in zip(measured, holm([family[name].p[metric] for name in measured]), strict=True):
            found[name] = replace(found[name], p_holm=found[name].p_holm | {metric: p})


def paired_difference(before: Summary, after: Summary, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Per metric, the mean over shared goals of (after - before), with its interval over those goals and p-value.

    Raises:
        DataError: the two share no goal id, so that nothing can be paired, or one id names two different goals.
    """
    first, second = before.intents, after.intents
    for goal in first.keys() & second.keys():
        if first[goal] != second[goal]:
            raise DataError(
                f"goal {goal!r} has intent {first[goal]!r} in one and {second[goal]!r} in the other; "
                "compare policies on the same environment and data"
            )
    differences = {}
    for metric in (name for name in before.by_goal if name in after.by_goal):
        old, new = before.by_goal[metric], after.by_goal[metric]
        if shared := [goal for goal in old if goal in new]:
            differences[metric] = [new[goal] - old[goal] for goal in shared]
    if not differences:
        raise DataError(
            f"cannot pair {len(first)} goals with {len(second)}: they share no goal id; "
            "evaluate both policies on the same goals (same environment, data and split)"
        )
    return Difference(
        metrics={metric: bootstrap(values, resamples, seed) for metric, values in differences.items()},
        goals=len(first.keys() & second.keys()),
        unpaired=len(first.keys() ^ second.keys()),
        p={metric: sign_flip_p(values, seed) for metric, values in differences.items()},
        p_holm={},
    )


def sign_flip_p(differences: Sequence[float], seed: int = 0, flips: int = FLIPS) -> float:
    """Two-sided p-value of a mean difference of zero, one difference per goal; the module says how. 1.0 without any.

    Three goals that all gain: of the 8 sign patterns, only +++ and --- have a mean that far from zero.

    >>> sign_flip_p([1.0, 2.0, 4.0])
    0.25
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]  # their sign changes nothing
    extreme = abs(values.sum()) - TIE * np.abs(values).sum()
    if 2**values.size <= flips:
        patterns = np.arange(2**values.size)[:, None] >> np.arange(values.size) & 1
        return float(np.mean(np.abs(_flipped(patterns, values)) >= extreme))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, flips, 500):  # 500 at a time: memory stays small for any number of goals
        patterns = rng.integers(0, 2, size=(min(500, flips - start), values.size), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs(_flipped(patterns, values)) >= extreme))
    return (1 + hits) / (1 + flips)


def _flipped(patterns: NDArray[np.integer], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of ``values`` under each row of ``patterns``: 1 keeps a sign, 0 flips it."""
    return 2.0 * (patterns @ values) - values.sum()


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the order given: below alpha means rejected at level alpha.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may fall below the one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
