"""The joint reward turn by turn: what each turn added to its trajectory's return. Ours, not the paper's.

Every built-in metric is a sum over turns, so nothing is invented here and nothing is lost:

    TSE      the weight of the subgoals completed at t, times ((1 - kappa) + kappa E) of the whole dialogue
    ESNDCG   rel_t(z_t) / log2(t + 2), over the metric's denominator
    GRE      the reply's own score / T; its parts and SOP compliance likewise
    turns    1          success, and the metrics of --gopo.reward: all of it at the last turn
"""

from __future__ import annotations

from collections.abc import Mapping

from openrlhf_gopo.rewards.joint import METRICS, joint
from openrlhf_gopo.rewards.ndcg import gains
from openrlhf_gopo.rewards.response import reply_scores
from openrlhf_gopo.rewards.tse import KAPPA, focused_engagement
from openrlhf_gopo.types import Trajectory

REPLY_METRICS = {"realised", "grounded", "no_repetition", "gre"}


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

    Two subgoals worth 0.4 and 0.6, completed at turns 0 and 2 of three fully engaged turns on task, so E = 1:

    >>> from openrlhf_gopo.types import Goal, Trajectory, Turn
    >>> goal = Goal("g", "refund", "", {"find": 0.4, "refund": 0.6})
    >>> done = [("find",), (), ("refund",)]
    >>> turns = [Turn("hi", (), "s", "a b c", completed=c, engagement=1.0, on_task=True) for c in done]
    >>> turn_rewards(Trajectory(goal, 0, 0, turns), {"tse": 1.0})
    [0.4, 0.0, 0.6]
    """
    turns = trajectory.turns
    count, last = len(turns), len(turns) - 1
    focus = 1.0 - kappa + kappa * focused_engagement(trajectory)
    further = {name: value for name, value in trajectory.rewards.items() if name not in METRICS}
    open_goals = dict(trajectory.goal.subgoals)
    earned = []
    # Reading the replies takes longer than all the rest, and the expert's return rarely asks for it.
    replies = reply_scores(trajectory) if weights.keys() & REPLY_METRICS else [dict[str, float]()] * count
    for t, (turn, gain, reply) in enumerate(zip(turns, gains(trajectory), replies, strict=True)):
        done = sum(open_goals.pop(subgoal, 0.0) for subgoal in turn.completed)
        metrics = {name: value / count for name, value in reply.items()} | {
            "tse": 100.0 * done * focus,
            "esndcg": gain,
            "success": float(trajectory.success) if t == last else 0.0,
            "turns": 1.0,
            "sop": (turn.strategy in turn.allowed) / count,
        }
        metrics |= {name: value if t == last else 0.0 for name, value in further.items()}
        earned.append(joint(metrics, weights))
    return earned


def decision_rewards(trajectory: Trajectory, weights: Mapping[str, float]) -> list[float]:
    """What the expert's decisions earned: r_t from the turn of one to the turn before the next, in order.

    A forced turn is nobody's decision: its reward belongs to the decision before it, or to none.
    """
    earned: list[float] = []
    for turn, reward in zip(trajectory.turns, turn_rewards(trajectory, weights), strict=True):
        if not turn.forced:
            earned.append(reward)
        elif earned:
            earned[-1] += reward
    return earned
