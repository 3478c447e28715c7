"""ESNDCG, the sequence-level reward of the expert. The name is the paper's; this formula is ours, not the paper's.

    ESNDCG = sum_t rel_t(z_t) / log2(t + 2)  /  sum_t max_{z in A_t} rel_t(z) / log2(t + 2)        t = 0..T-1

rel in {0, 1, 2, 3} grades every allowed strategy before the choice, so the best choice at every turn scores 1.
"""

from __future__ import annotations

import math

from openrlhf_gopo.types import Trajectory


def esndcg(trajectory: Trajectory) -> float:
    """ESNDCG in [0, 1]; 0 without turns, or where no turn offered a strategy of any relevance.

    A turn without grades (``relevance`` empty, as in human logs) adds nothing above or below.

    Turn 0 picks the 1 where a 3 was there, turn 1 picks the best, a 2: with 1/log2(2) = 1 and 1/log2(3) = 0.6309,
    ESNDCG = (1 + 1.2619) / (3 + 1.2619) = 0.5307.

    >>> from openrlhf_gopo.types import Goal, Trajectory, Turn
    >>> first = Turn("hi", ("a", "b"), "b", "", relevance={"a": 3, "b": 1})
    >>> second = Turn("ok", ("a", "b"), "a", "", relevance={"a": 2, "b": 0})
    >>> round(esndcg(Trajectory(Goal("g", "", "", {"x": 1.0}), 0, 0, [first, second])), 4)
    0.5307
    """
    discounts = [math.log2(t + 2) for t in range(len(trajectory.turns))]
    graded = list(zip(trajectory.turns, discounts, strict=True))
    gained = sum(turn.relevance.get(turn.strategy, 0) / d for turn, d in graded)
    possible = sum(max(turn.relevance.values(), default=0) / d for turn, d in graded)
    # One division of two sums: rounded addition is monotone, so the best choices score 1 exactly, and never more.
    return gained / possible if possible > 0 else 0.0
