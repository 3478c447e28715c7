"""Replies against their siblings: by hand, and over every group that a small policy can draw."""

from itertools import product

import pytest
import torch

from openrlhf_gopo.core.reply_groups import sibling_advantages


def test_by_hand():
    # 1 - (0 + 0.5 + 0.25)/3 = 0.75; 0.2 - 0.6; a reply alone and a turn without scores have nothing to stand against.
    found = sibling_advantages([(1.0, 0.0, 0.5, 0.25), (0.2, 0.6), (0.9,), ()])
    assert found.tolist() == pytest.approx([0.75, -0.4, 0.0, 0.0])
    assert found.dtype == torch.float64
    assert sibling_advantages([]).shape == (0,)


def test_a_group_that_scores_alike_teaches_nothing():
    assert sibling_advantages([(0.5, 0.5, 0.5)]).tolist() == [0.0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_mean_over_all_groups_is_the_gradient_of_the_expected_score(size):
    """Four replies with scores s under softmax logits: d/d logits sum_y pi(y) s(y), to 1e-12, with each of N said."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([1.0, 0.2, 0.7, -0.4], dtype=torch.float64)
    (true,) = torch.autograd.grad((logits.softmax(0) * scores).sum(), logits)
    chances = logits.detach().softmax(0)
    grad_log = torch.eye(4, dtype=torch.float64) - chances  # row y: d log pi(y) / d logits
    estimate, share = torch.zeros(4, dtype=torch.float64), 0.0
    for drawn in product(range(4), repeat=size):
        for said in range(size):
            order = [drawn[said], *drawn[:said], *drawn[said + 1 :]]
            (advantage,) = sibling_advantages([scores[order].tolist()])
            chance = float(chances[list(drawn)].prod()) / size
            estimate += chance * advantage * grad_log[drawn[said]]
            share += chance
    assert share == pytest.approx(1.0)
    assert torch.allclose(estimate, true, rtol=0, atol=1e-12)
