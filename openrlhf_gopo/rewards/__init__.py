"""Rewards and metrics: pure functions of a ``Trajectory``.

The functions ``tse`` and ``joint`` are imported from their modules of the same name. What --gopo.reward adds is in
``custom``.
"""

from openrlhf_gopo.rewards.joint import METRICS, parse_weights, score
from openrlhf_gopo.rewards.ndcg import esndcg
from openrlhf_gopo.rewards.response import gre, grounded, no_repetition, realised, response_scores
from openrlhf_gopo.rewards.tse import focused_engagement, progress

__all__ = [
    "METRICS",
    "esndcg",
    "focused_engagement",
    "gre",
    "grounded",
    "no_repetition",
    "parse_weights",
    "progress",
    "realised",
    "response_scores",
    "score",
]
