"""Turn-level credit: what came after an action, against a baseline that does not depend on it.

    G_it = sum_{u >= t} gamma^(u-t) r_iu      A_it = G_it - (1/(K-1)) sum_{j != i} G_jt      G_jt = 0 once j has ended

for the K dialogues i of one goal, r_t the causal rewards of ``rewards.turns``. What the other dialogues earned from
turn t on does not depend on one's own choice at t, so the baseline is unbiased. One number for all turns of a group is
none: returns to go fall towards the end, so early actions would look good and late ones
bad whatever was chosen. GAE is that of arXiv 1506.02438 with the decision, not the token, as the step.
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


def turn_advantages(
    rewards: Sequence[Sequence[float]], groups: Sequence[torch.Tensor], *, estimator: str = "rloo", gamma: float = 1.0
) -> list[torch.Tensor]:
    """A_it of every turn: rewards of M dialogues, T_i turns each -> M tensors (T_i + 1,), float64.

    The last entry is that of an action that no turn carried out: nothing comes after it.

    Args:
        groups: LongTensors of dialogue indices, the dialogues of one goal. A dialogue in no group (quarantined) gets
            zeros. A group of one has no baseline: A = G.
        estimator: OpenRLHF's name. "rloo", "reinforce_baseline", "dr_grpo": A as above, unbiased. "group_norm": A over
            the standard deviation of the group's returns to go (0 for a single turn), which own choices move: biased
            by O(1/K). "flash_reinforce": G less the mean over all turns of the batch, own ones included: biased.
            "reinforce": G, unbiased.

    Raises:
        ValueError: unknown ``estimator``.
    """
    if estimator not in ("rloo", "reinforce_baseline", "dr_grpo", "group_norm", "flash_reinforce", "reinforce"):
        raise ValueError(f"turn_advantages: unknown estimator {estimator!r}")
    lengths = [len(row) for row in rewards]
    togo = returns_to_go(torch.tensor([r for row in rewards for r in row], dtype=torch.float64), lengths, gamma)
    table = torch.zeros(len(rewards), max(lengths, default=0) + 1, dtype=torch.float64)
    for row, mine in zip(table, togo.split(lengths), strict=True):
        row[: len(mine)] = mine
    found = torch.zeros_like(table)
    for group in groups:
        scores = table[group]
        played = torch.cat([table[i, : lengths[i]] for i in group]) if len(group) else togo[:0]
        if estimator == "flash_reinforce":
            scores = scores - togo.mean()
        elif estimator != "reinforce":
            scores = scores - (scores.sum(0) - scores) / max(len(group) - 1, 1)
        if estimator == "group_norm":
            scores = scores / (played.std() + 1e-9) if len(played) > 1 else scores * 0.0
        found[group] = scores
    return [row[: length + 1] for row, length in zip(found, lengths, strict=True)]


def unit_scale(advantages: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Divide by the root mean square of the batch; all zeros stay zeros."""
    return advantages / advantages.pow(2).mean().sqrt().clamp(min=eps) if len(advantages) else advantages
