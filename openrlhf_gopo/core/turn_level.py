"""Turn-level credit: one reward per action of a role (a decision, a reply) instead of one per trajectory.

The actions of a batch stand one after the other, (N,); ``lengths`` says how many belong to each trajectory. GAE is that
of arXiv 1506.02438 with the action, not the token, as the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def returns_to_go(rewards: torch.Tensor, lengths: Sequence[int], gamma: float = 1.0) -> torch.Tensor:
    """G_n = r_n + gamma G_{n+1} within each trajectory: (N,) -> (N,), float64."""
    rewards = rewards.double()
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma=gamma, lambd=1.0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], *, gamma: float, lambd: float
) -> torch.Tensor:
    """A_n = delta_n + gamma lambd A_{n+1}, delta_n = r_n + gamma V_{n+1} - V_n, V = 0 after the last: (N,), float64.

    The critic's targets are A + V.
    """
    r, v = rewards.tolist(), values.tolist()
    advantages = [0.0] * len(r)
    stop = 0
    for length in lengths:
        start, stop = stop, stop + length
        following = carried = 0.0
        for n in reversed(range(start, stop)):
            carried = r[n] + gamma * following - v[n] + gamma * lambd * carried
            advantages[n], following = carried, v[n]
    return torch.tensor(advantages, dtype=torch.float64)


def group_baseline(
    scores: torch.Tensor, lengths: Sequence[int], groups: Sequence[torch.Tensor], *, estimator: str
) -> torch.Tensor:
    """Scores of actions, (N,), against those of the other dialogues of the same goal: (N,), float64.

    The baseline is one number for all the actions of a trajectory, never one per turn index: the policy decides how
    many turns there are. ``estimator`` is OpenRLHF's name: "group_norm" (less the group's mean, over its standard
    deviation), "reinforce_baseline" and "dr_grpo" (less the mean), "rloo" (less the mean of the others' actions),
    "flash_reinforce" (less the batch's mean), "reinforce" (as they are). Trajectories in no group (quarantined) get
    zeros.

    Args:
        groups: LongTensors of trajectory indices.
    """
    scores = scores.double()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    result = torch.zeros_like(scores)
    everything = scores.mean() if len(scores) else scores.new_zeros(())
    for group in groups:
        inside = torch.isin(owner, group)
        mine = scores[inside]
        if len(mine) == 0:
            continue
        if estimator == "rloo":
            for i in group:
                own, others = owner == i, inside & (owner != i)
                result[own] = scores[own] - (scores[others].mean() if bool(others.any()) else 0.0)
        elif estimator == "group_norm":
            result[inside] = (mine - mine.mean()) / (mine.std() + 1e-9) if len(mine) > 1 else 0.0
        elif estimator in ("reinforce_baseline", "dr_grpo"):
            result[inside] = mine - mine.mean()
        elif estimator == "flash_reinforce":
            result[inside] = mine - everything
        elif estimator == "reinforce":
            result[inside] = mine
        else:
            raise ValueError(f"group_baseline: unknown estimator {estimator!r}")
    return result


def unit_scale(advantages: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Divide by the root mean square of the batch; all zeros stay zeros."""
    return advantages / advantages.pow(2).mean().sqrt().clamp(min=eps) if len(advantages) else advantages
