"""Preferences between the decisions of one turn: credit where the dialogues are. Ours, not the paper's.

    L = mean over pairs (w, l) of  -log sigmoid(log pi(z_w | h_w, A_w) - log pi(z_l | h_l, A_l))        at m = 0

over pairs of decisions at the same turn of two dialogues of one goal that chose differently, w being the one with the
larger return to go. Unlike the preference between whole dialogues it does not blame a good choice for a bad one
elsewhere. It is biased: what came before turn t differs between the two dialogues.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import torch

from openrlhf_gopo.core.preference import TIE


def decision_preference(
    togo: torch.Tensor, chosen: Sequence[Hashable], places: Sequence[Hashable | None]
) -> torch.Tensor:
    """-dL / d log pi of every decision: 1/2 for each pair that it wins, -1/2 for each that it loses, over all pairs.

    Args:
        togo: (N,) return to go of each decision.
        chosen: N strategies.
        places: N keys (goal, turn); decisions of one place are compared, None is compared with nothing.

    Returns:
        (N,) float64; zeros where there is no pair.
    """
    at: dict[Hashable, list[int]] = defaultdict(list)
    for n, place in enumerate(places):
        if place is not None:
            at[place].append(n)
    scores, pairs = togo.double().tolist(), 0
    found = [0.0] * len(scores)
    for i, j in (pair for rows in at.values() for pair in combinations(rows, 2)):
        if chosen[i] == chosen[j] or abs(scores[i] - scores[j]) <= TIE:
            continue
        won, lost = (i, j) if scores[i] > scores[j] else (j, i)
        found[won] += 0.5
        found[lost] -= 0.5
        pairs += 1
    return torch.tensor(found, dtype=torch.float64) / max(pairs, 1)
