"""Reply groups: a reply against its siblings, other replies to the same history under the same strategy. Ours.

N replies y_1 .. y_N are drawn from pi(. | h, z) and scored, s_i = s(h, z, y_i). One of them, k, is drawn uniformly and
said:

    A = s_k - 1/(N-1) sum_{i != k} s_i        E[A grad log pi(y_k | h, z)] = grad E_{y ~ pi(. | h, z)}[s(h, z, y)]

The siblings are independent of y_k, so their mean is a baseline that adds no bias. It is the gradient of the score that
the reply has itself: what it changes in the scores of later ones is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sibling_advantages(groups: Sequence[Sequence[float]]) -> torch.Tensor:
    """A of M replies, (M,) float64. Each group: the score of the reply that was said, then those of its siblings.

    A reply without siblings, or without scores, gets 0.
    """
    found = [scores[0] - sum(scores[1:]) / (len(scores) - 1) if len(scores) > 1 else 0.0 for scores in groups]
    return torch.tensor(found, dtype=torch.float64)
