"""The joint reward turn by turn: what each turn added to its trajectory's return. Ours, not the paper's.

    r_t = R(tau_<=t) - R(tau_<t)        R of a prefix: its joint reward, had the dialogue ended there; R of nothing is 0

The rewards are causal (r_t depends on no later turn) and telescope to the return. So sum_{u >= t} r_u is all that the
choice at t can change: the rewards before t were settled before it.

Metrics of --gopo.reward know whole dialogues alone: all of theirs is earned at the last turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate

from openrlhf_gopo.rewards.joint import METRICS, joint
from openrlhf_gopo.rewards.response import reply_scores
from openrlhf_gopo.rewards.tse import KAPPA
from openrlhf_gopo.types import Trajectory

REPLY_METRICS = ("realised", "grounded", "no_repetition", "gre")


def split_weights(weights: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """``weights`` of what one reply alone earns, and those of the rest.

    >>> split_weights({"tse": 0.5, "gre": 1.0})
    ({'gre': 1.0}, {'tse': 0.5})
    """
    own = {name: weight for name, weight in weights.items() if name in REPLY_METRICS}
    return own, {name: weight for name, weight in weights.items() if name not in own}


def turn_rewards(trajectory: Trajectory, weights: Mapping[str, float], kappa: float = KAPPA) -> list[float]:
    """r_t of every turn, with sum_t r_t = ``joint(trajectory.rewards, weights)`` for rewards scored with ``kappa``.

    Built-in metrics are computed anew, all others taken from ``trajectory.rewards``.

    Two subgoals worth 0.4 and 0.6, completed at turns 0 and 2; the turn between is off task, so that E falls from 1 to
    1/2 and ends at 2/3: R = 0.4, 0.4 x 0.75, 1 x 0.8333.

    >>> from openrlhf_gopo.types import Goal, Trajectory, Turn
    >>> goal = Goal("g", "refund", "", {"find": 0.4, "refund": 0.6})
    >>> done = [("find",), (), ("refund",)]
    >>> turns = [Turn("hi", (), "s", "a b c", completed=c, engagement=1.0, on_task=bool(c)) for c in done]
    >>> [round(r, 4) for r in turn_rewards(Trajectory(goal, 0, 0, turns), {"tse": 1.0})]
    [0.4, -0.1, 0.5333]
    """
    values = [joint(metrics, weights) for metrics in _prefixes(trajectory, weights, kappa)]
    return [after - before for before, after in zip([0.0, *values], values, strict=False)]


def _prefixes(trajectory: Trajectory, weights: Mapping[str, float], kappa: float) -> Iterator[dict[str, float]]:
    """The metrics of the first 1, 2, ..., T turns, each from the sums over the turns before."""
    turns, open_goals = trajectory.turns, dict(trajectory.goal.subgoals)
    further = {name: value for name, value in trajectory.rewards.items() if name not in METRICS}
    replies = _means(trajectory) if any(name in weights for name in REPLY_METRICS) else None
    done: list[float] = []
    focus = gained = possible = kept = 0.0
    for count, turn in enumerate(turns, 1):
        done += [open_goals.pop(subgoal, 0.0) for subgoal in turn.completed]
        focus += turn.engagement if turn.on_task else 0.0
        gained += turn.relevance.get(turn.strategy, 0) / math.log2(count + 1)
        possible += max(turn.relevance.values(), default=0) / math.log2(count + 1)
        kept += turn.strategy in turn.allowed
        last = count == len(turns)
        yield {
            "tse": 100.0 * math.fsum(done) * (1.0 - kappa + kappa * focus / count),
            "esndcg": gained / possible if possible > 0 else 0.0,
            "success": float(trajectory.success) if last else float(not open_goals),
            "turns": float(count),
            "sop": kept / count,
            **(next(replies) if replies else {}),
            **{name: value if last else 0.0 for name, value in further.items()},
        }


def _means(trajectory: Trajectory) -> Iterator[dict[str, float]]:
    """The mean of each reply metric over the first 1, 2, ..., T replies."""
    scores = reply_scores(trajectory)
    sums = {name: list(accumulate(reply[name] for reply in scores)) for name in REPLY_METRICS}
    yield from ({name: sums[name][n] / (n + 1) for name in REPLY_METRICS} for n in range(len(scores)))
