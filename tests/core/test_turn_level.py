"""Turn-level credit against numbers derived by hand and the sums as they are written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.turn_level import gae, returns_to_go, turn_advantages, unit_scale


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
REWARDS = [[2, 1], [5], [7]]  # dialogues (2, 1), (5) of one goal; (7) alone. Returns to go (3, 1), (5); (7)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Turn 0: 3 and 5, each less the other. Turn 1: 1 against 0 of the dialogue that has ended, whose own action
        # there, which no turn carried out, is judged against 1. The last dialogue has nothing to be compared with.
        *[(name, ((-2, 1, 0), (2, -1), (7, 0))) for name in ("rloo", "reinforce_baseline", "dr_grpo")],
        # Over the standard deviation (over n - 1) of 3, 1, 5: 2; a single turn has no spread.
        ("group_norm", ((-1, 0.5, 0), (1, -0.5), (0, 0))),
        ("flash_reinforce", ((-1, -3, -4), (1, -4), (3, -4))),  # the batch's mean is 4
        ("reinforce", ((3, 1, 0), (5, 0), (7, 0))),
    ],
)
def test_turn_advantages_by_hand(estimator, expected):
    found = turn_advantages(REWARDS, GROUPS, estimator=estimator)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, t(*theirs), rtol=0, atol=1e-8)


def test_three_dialogues_and_a_discount_by_hand():
    # gamma 1/2: to go (1 + 2/2, 2), (4), (6 + 0/2, 0): turn 0 less the mean of the two others: 2 - 5, 4 - 4, 6 - 3;
    # turn 1: 2 - 0, 0 - 1 (nobody carried it out), 0 - 1; after the last turn nothing is to come.
    found = turn_advantages([[1, 2], [4], [6, 0]], [torch.arange(3)], gamma=0.5)
    assert [row.tolist() for row in found] == [[-3, 2, 0], [0, -1], [3, -1, 0]]


def test_a_quarantined_dialogue_moves_nothing_and_gets_nothing():
    found = turn_advantages([*REWARDS, []], GROUPS, estimator="group_norm")
    for mine, theirs in zip(found, turn_advantages(REWARDS, GROUPS, estimator="group_norm"), strict=False):
        assert torch.equal(mine, theirs)
    assert found[3].tolist() == [0.0]
    # With a log of what was played before it failed: still nothing.
    assert turn_advantages([*REWARDS, [100.0]], GROUPS, estimator="group_norm")[3].tolist() == [0.0, 0.0]
    none = turn_advantages([[], []], [torch.tensor([], dtype=torch.long)])
    assert [row.tolist() for row in none] == [[0.0], [0.0]]


def test_an_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="nosuch"):
        turn_advantages(REWARDS, GROUPS, estimator="nosuch")


def test_unit_scale():
    assert torch.equal(unit_scale(t(3, -4, 0, 5) * 2), t(3, -4, 0, 5) / t(12.5).sqrt())
    assert torch.equal(unit_scale(t(0, 0)), t(0, 0))
    assert len(unit_scale(t())) == 0
