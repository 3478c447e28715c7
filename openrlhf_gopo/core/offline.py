"""What learning from logs needs beside the preference loss. All of it is ours.

Whom to compare: dialogues of one task whose goals are alike, in chunks of K, as a rollout's groups are. Where the logs
say nothing: with n(k, z) the decisions for strategy z that the training logs of task k hold,

    S_k = {z : n(k, z) >= n_min}        A'_t = A_t & S_k

the expert learns on pi(z | h, A'_t). Pushing a worse dialogue's choice down raises the other strategies of the softmax,
and offline nobody would find out that one of these, never tried by the logs' agents, is bad: on A'_t it is neither
raised nor lowered. A decision whose own z_t is not in A'_t is none.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from openrlhf_gopo.core.preference import preference_coefficients, trajectory_log_ratio


def supported(decisions: Iterable[tuple[str, str]], least: int) -> dict[str, frozenset[str]]:
    """S_k by task k, from the (task, strategy) of every logged decision; ``least`` is n_min."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for task, strategy in decisions:
        counts[task][strategy] += 1
    return {task: frozenset(z for z, n in count.items() if n >= least) for task, count in counts.items()}


def alike(features: Sequence[frozenset[str]], least: float) -> list[list[int]]:
    """Groups of indices: each joins the first group whose first member has Jaccard similarity >= ``least`` in [0, 1].

    0 gives one group. Two empty sets are alike.
    """
    groups: list[list[int]] = []
    for index, mine in enumerate(features):
        for group in groups:
            theirs = features[group[0]]
            if len(mine & theirs) >= least * len(mine | theirs):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def better(groups: Iterable[Sequence[int]], returns: Sequence[float], share: float) -> set[int]:
    """The best ``share`` of each group by return, rounded up; ties go to the first."""
    kept: set[int] = set()
    for group in groups:
        ranked = sorted(group, key=lambda i: -returns[i])
        kept.update(ranked[: math.ceil(share * len(group))])
    return kept


def chunked(groups: Iterable[Sequence[int]], size: int, rng: random.Random) -> list[list[int]]:
    """Every group, shuffled, in equal parts of at most ``size``; as many chunks whatever the order."""
    chunks = []
    for group in groups:
        order = rng.sample(group, len(group))
        parts = math.ceil(len(order) / size)
        chunks += [order[part::parts] for part in range(parts)]
    return chunks


@dataclass(frozen=True)
class Units:
    """What is compared: whole dialogues for the expert, replies under one strategy for the responder.

    ``owner`` (N,): whose action each is; ``weights`` (N,): its weight w in m(unit); ``returns`` (M,); ``groups``: which
    units are compared; ``imitated`` (N,): actions of better dialogues.
    """

    owner: torch.Tensor
    weights: torch.Tensor
    returns: torch.Tensor
    groups: list[torch.Tensor]
    imitated: torch.Tensor


def action_coefficients(
    logprobs: torch.Tensor,
    reference: torch.Tensor,
    units: Units,
    *,
    pref_coef: float,
    sft_coef: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """-dL/d log pi of every action, in two parts, so that the gradient of L is -sum_n (p_n + s_n) grad log pi_n.

        L = pref_coef L_pref - sft_coef (1/N') sum_{n imitated} log pi_n        N': imitated actions

    with L_pref of ``core.preference`` over ``units``. Each part is a mean over this call's own terms, ``pref_pairs``
    and ``sft_terms``: who spreads a step over ranks scales each by its share of all terms.

    Args:
        logprobs, reference: (N,) log pi and log pi_ref of the actions. Neither needs a graph.
        beta: as in ``preference_coefficients``.

    Returns:
        p (N,) and s (N,) float64; the metrics of ``preference_coefficients``, and N' as ``sft_terms``.
    """
    m = trajectory_log_ratio(
        logprobs.detach().double(), reference.double(), units.owner, units.weights, len(units.returns)
    )
    c, metrics = preference_coefficients(m, units.returns, units.groups, beta=beta)
    imitated = units.imitated.double()
    metrics["sft_terms"] = float(imitated.sum())
    return pref_coef * c[units.owner] * units.weights, sft_coef * imitated / max(metrics["sft_terms"], 1.0), metrics
