"""All metrics of a trajectory, and their weighted sum: the joint reward. The formulas are ours, not the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.rewards.ndcg import esndcg
from openrlhf_gopo.rewards.response import response_scores
from openrlhf_gopo.rewards.tse import KAPPA, tse
from openrlhf_gopo.types import Trajectory

METRICS = ("tse", "esndcg", "gre", "realised", "grounded", "no_repetition", "success", "turns", "sop")


def score(trajectory: Trajectory, kappa: float = KAPPA) -> dict[str, float]:
    """Every metric of ``METRICS``, in that order; all 0 without turns.

    ``tse`` in [0, 100]; ``turns`` a count; ``success`` 0 or 1; ``sop`` the share of turns whose strategy was allowed;
    the others in [0, 1].

    Raises:
        DialogueError: a turn completed a subgoal that the goal does not have.
    """
    turns = trajectory.turns
    if not turns:
        return dict.fromkeys(METRICS, 0.0)
    found = {
        **response_scores(trajectory),
        "tse": tse(trajectory, kappa),
        "esndcg": esndcg(trajectory),
        "success": float(trajectory.success),
        "turns": float(len(turns)),
        "sop": sum(turn.strategy in turn.allowed for turn in turns) / len(turns),
    }
    return {name: found[name] for name in METRICS}


def joint(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of ``rewards`` (as ``score`` gives them), with ``tse`` scaled to [0, 1].

    >>> joint({"tse": 49.0, "gre": 0.8}, {"tse": 1.0, "gre": 0.5})
    0.89

    Raises:
        ConfigError: a weight's name is not in ``rewards``.
    """
    total = 0.0
    for name, weight in weights.items():
        if name not in rewards:
            raise ConfigError(f"reward weight {name}={weight}: no such reward; choose from {', '.join(rewards)}")
        total += weight * rewards[name] * (0.01 if name == "tse" else 1.0)
    return total


def parse_weights(text: str, known: Sequence[str] = METRICS) -> dict[str, float]:
    """Reward weights from ``name=weight,name=weight``, of the metrics ``known``.

    >>> parse_weights("tse=1, gre=0.5")
    {'tse': 1.0, 'gre': 0.5}

    Raises:
        ConfigError: an unknown or repeated name, a weight that is no finite number, or nothing at all.
    """
    weights: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in known:
            raise ConfigError(f"reward weights {text!r}: unknown reward {name!r}; choose from {', '.join(known)}")
        if name in weights:
            raise ConfigError(f"reward weights {text!r}: {name} is given twice")
        weights[name] = _finite(value) if equals else math.nan
        if not math.isfinite(weights[name]):
            raise ConfigError(f"reward weights {text!r}: {name} needs a finite number, as in {name}=0.5")
    if not weights:
        raise ConfigError(f"reward weights {text!r}: give at least one, as in tse=1,gre=0.5")
    return weights


def _finite(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan
