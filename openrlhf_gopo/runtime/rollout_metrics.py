"""What one batch of dialogues was like: the ``rollout/*`` metrics and the staleness of each role."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.runtime.samples import DialogueSample


def rollout_metrics(
    samples: Sequence[DialogueSample], config: GopoConfig, num_labels: int, global_step: int
) -> dict[str, float]:
    """Means over the goals of a batch that is about to be trained on, after ``global_step`` updates.

    ``rollout/<metric>`` of the trajectories, ``rollout/stop/<reason>`` shares, ``rollout/failures`` a count;
    ``forced_turns`` the share of turns with one allowed strategy, ``masked_labels`` the mean share of labels that the
    SOP ruled out, ``<role>_tokens`` the length of a stream. ``ROLE/staleness``: updates of the role's model between
    a turn and now; ``rollout/mixed_versions``: share of dialogues that met a change of weights. With reply groups,
    ``rollout/reply_best_of_n``: how far the best of a turn's replies is above their mean, and ``rollout/reply_spread``:
    the share of turns whose replies do not all score alike.
    """
    kept = [s for s in samples if not s.quarantined]
    summary = summarise([s.trajectory for s in samples])
    status = {f"rollout/{key}": interval.mean for key, interval in summary.metrics.items()}
    status |= {f"rollout/stop/{key}": share for key, share in summary.stops.items()}
    status["rollout/failures"] = float(len(samples) - len(kept))
    turns = [turn for s in kept for turn in s.trajectory.turns]
    status["rollout/forced_turns"] = sum(turn.forced for turn in turns) / max(len(turns), 1)
    allowed = sum(len(turn.allowed) for turn in turns) / max(len(turns), 1)
    status["rollout/masked_labels"] = 1.0 - allowed / num_labels
    status |= _of_reply_groups([turn.reply_group for turn in turns if turn.reply_group])
    versions = [turn.version for turn in turns]
    for role in config.roles:
        lengths = [len(s.trajectory.streams[role].tokens) for s in kept]
        status[f"rollout/{role}_tokens"] = sum(lengths) / max(len(lengths), 1)
        ages = {v: sum(_updated(role, step, config) for step in range(v, global_step)) for v in set(versions)}
        status[f"{role}/staleness"] = sum(ages[v] for v in versions) / max(len(versions), 1)
        status[f"{role}/staleness_max"] = float(max(ages.values(), default=0))
    mixed = sum(len({turn.version for turn in s.trajectory.turns}) > 1 for s in kept)
    return status | {"rollout/mixed_versions": mixed / max(len(kept), 1)}


def _of_reply_groups(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    if not groups:
        return {}
    gaps = [max(scores) - sum(scores) / len(scores) for scores in groups]
    apart = [max(scores) > min(scores) for scores in groups]
    return {
        "rollout/reply_best_of_n": sum(gaps) / len(groups),
        "rollout/reply_spread": sum(apart) / len(groups),
    }


def _updated(role: str, step: int, config: GopoConfig) -> bool:
    """Whether the model of ``role`` learns at ``step``: with sharing, whichever role's turn it is."""
    return role in config.learners(step) or not config.own_expert
