"""Turn-level credit against numbers derived by hand and the sums as they are written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.turn_level import gae, group_baseline, returns_to_go, unit_scale


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_returns_to_go_by_hand():
    # Two trajectories, (1, 2, 3) and (4), gamma 1/2: 1 + 2/2 + 3/4, 2 + 3/2, 3; the second starts anew: 4.
    assert torch.equal(returns_to_go(t(1, 2, 3, 4), [3, 1], gamma=0.5), t(2.75, 3.5, 3.0, 4.0))


def test_gae_by_hand():
    # r = (1, 2), V = (0.5, 1), gamma 0.5, lambda 0.5. Last: delta = 2 - 1 = 1. First: delta = 1 + 0.5 x 1 - 0.5 = 1,
    # A = 1 + 0.25 x 1 = 1.25. Targets A + V = (1.75, 2).
    assert torch.equal(gae(t(1, 2), t(0.5, 1), [2], gamma=0.5, lambd=0.5), t(1.25, 1.0))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lambd=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_gae_is_the_written_sum(lengths, gamma, lambd, seed):
    """A_n = sum_k (gamma lambda)^k delta_{n+k}, within each trajectory."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64, generator=generator)
    expected = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        following = torch.cat([v[1:], v.new_zeros(1)])[: len(v)]
        deltas = r + gamma * following - v
        expected += [sum((gamma * lambd) ** k * deltas[n + k] for k in range(len(r) - n)) for n in range(len(r))]
    found = gae(rewards, values, lengths, gamma=gamma, lambd=lambd)
    assert torch.allclose(found, t(*expected), rtol=0, atol=1e-10)


GROUPS = [torch.tensor([0, 1]), torch.tensor([2])]
SCORES, LENGTHS = t(3, 1, 5, 7), [2, 1, 1]  # dialogues (3, 1), (5) of one goal; (7) alone


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # The first group's mean is 3, its standard deviation (over n - 1) 2; a single action has no spread.
        ("group_norm", (0, -1, 1, 0)),
        ("reinforce_baseline", (0, -2, 2, 0)),
        ("dr_grpo", (0, -2, 2, 0)),
        # Less the mean of the other dialogues of the goal: 5, and (3 + 1)/2; the last has no other.
        ("rloo", (-2, -4, 3, 7)),
        ("flash_reinforce", (-1, -3, 1, 3)),  # the batch's mean is 4
        ("reinforce", (3, 1, 5, 7)),
    ],
)
def test_group_baseline_by_hand(estimator, expected):
    found = group_baseline(SCORES, LENGTHS, GROUPS, estimator=estimator)
    assert torch.allclose(found, t(*expected), rtol=0, atol=1e-8)


def test_a_quarantined_dialogue_moves_nothing_and_gets_nothing():
    with_failure = group_baseline(t(3, 1, 5, 7, 100), [2, 1, 1, 1], GROUPS, estimator="group_norm")
    assert torch.allclose(with_failure, t(0, -1, 1, 0, 0), rtol=0, atol=1e-8)


def test_an_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="nosuch"):
        group_baseline(SCORES, LENGTHS, GROUPS, estimator="nosuch")


def test_unit_scale():
    assert torch.equal(unit_scale(t(3, -4, 0, 5) * 2), t(3, -4, 0, 5) / t(12.5).sqrt())
    assert torch.equal(unit_scale(t(0, 0)), t(0, 0))
    assert len(unit_scale(t())) == 0
