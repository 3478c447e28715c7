"""The preference loss against numbers derived by hand and against brute force in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.preference import (
    decision_advantages,
    preference_coefficients,
    preference_pairs,
    trajectory_log_ratio,
    trajectory_preference_loss,
    turn_weights,
)

returns_of_a_group = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6)


def pairs(returns):
    return preference_pairs(torch.tensor(returns, dtype=torch.float64)).tolist()


def test_turn_weights_by_hand():
    assert turn_weights(3, mode="sum").tolist() == [1, 1, 1]
    assert turn_weights(4, mode="mean").tolist() == [0.25] * 4
    assert turn_weights(0, mode="mean").tolist() == []
    with pytest.raises(ValueError, match="nosuch"):
        turn_weights(3, mode="nosuch")


def test_pairs_by_hand():
    assert pairs([1.0, 3.0, 2.0]) == [[1, 2], [1, 0], [2, 0]]
    assert pairs([0.1 + 0.2, 0.3, 0.3 + 2e-9]) == [[2, 0], [2, 1]]  # rounding is no preference


def test_a_group_without_spread_has_no_pairs():
    assert pairs([2.0, 2.0, 2.0]) == []
    assert pairs([2.0]) == []
    assert pairs([]) == []  # every trajectory of the group was quarantined


def test_one_turn_two_trajectories_is_dpo():
    # x = 2 (0.5 - (-0.3)) = 1.6, and -log sigmoid(1.6) = log(1 + e^-1.6) = 0.183898...
    loss = trajectory_preference_loss(torch.tensor([0.5, -0.3], dtype=torch.float64), torch.tensor([[0, 1]]), beta=2.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.6)), abs=1e-12)


def test_coefficients_by_hand():
    # L = log(1 + e^(-2 (m0 - m1))), so c = -dL/dm = (2 sigmoid(0), -2 sigmoid(0)) = (1, -1) at m = 0.
    c, metrics = preference_coefficients(torch.zeros(2), torch.tensor([1.0, 0.0]), [torch.arange(2)], beta=2.0)
    assert c.tolist() == pytest.approx([1.0, -1.0])
    assert metrics["pref_loss"] == pytest.approx(math.log(2))
    assert metrics["pref_accuracy"] == 0.5  # a tie counts half
    assert metrics["pref_pairs"] == 1


def test_a_flat_group_is_counted_and_pulls_nowhere():
    c, metrics = preference_coefficients(torch.zeros(4), torch.ones(4), [torch.arange(2), torch.arange(2, 4)], beta=1.0)
    assert c.tolist() == [0.0] * 4
    assert metrics["pref_groups_without_spread"] == 2


def test_a_trajectory_outside_every_group_gets_no_coefficient():
    c, _ = preference_coefficients(torch.zeros(3), torch.tensor([1.0, 0.0, 99.0]), [torch.tensor([0, 1])], beta=1.0)
    assert c[2] == 0
    assert c[0] > 0


@given(returns_of_a_group, st.randoms())
@settings(max_examples=60, deadline=None)
def test_coefficients_follow_a_permutation_of_the_group(returns, random):
    size = len(returns)
    m = torch.tensor([random.uniform(-1, 1) for _ in range(size)], dtype=torch.float64)
    r = torch.tensor(returns, dtype=torch.float64)
    order = torch.tensor(random.sample(range(size), size))
    straight, _ = preference_coefficients(m, r, [torch.arange(size)], beta=0.7)
    permuted, _ = preference_coefficients(m[order], r[order], [torch.arange(size)], beta=0.7)
    assert torch.allclose(straight[order], permuted, atol=1e-12)
    assert straight.sum().abs() < 1e-12  # preferences push apart, never all up


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_micro_batched_gradient_equals_one_big_batch(micro_batch, dtype, tolerance):
    """Weighted back-propagation of one trajectory at a time = autograd of the written loss over all of them."""
    torch.manual_seed(0)
    lengths = [3, 1, 4, 2, 5, 2]
    weight = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    inputs = [torch.randn(n, 4, dtype=dtype) for n in lengths]
    choices = [torch.randint(0, 5, (n,)) for n in lengths]
    reference = [torch.randn(n, dtype=dtype) for n in lengths]
    returns = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3, 0.2], dtype=dtype)
    groups = [torch.arange(3), torch.arange(3, 6)]

    def log_ratio(i):
        logprobs = torch.log_softmax(inputs[i] @ weight, -1).gather(-1, choices[i].unsqueeze(-1)).squeeze(-1)
        w = turn_weights(lengths[i], mode="mean").to(dtype)
        return trajectory_log_ratio(logprobs, reference[i], torch.zeros(lengths[i], dtype=torch.long), w, 1)[0]

    m = torch.stack([log_ratio(i) for i in range(6)])
    pairs = [group[preference_pairs(returns[group])] for group in groups]
    terms = [trajectory_preference_loss(m, of_group, beta=0.5) for of_group in pairs]
    (whole,) = torch.autograd.grad(torch.cat(terms).mean(), weight)

    c, _ = preference_coefficients(m, returns, groups, beta=0.5)
    for start in range(0, 6, micro_batch):
        part = range(start, min(start + micro_batch, 6))
        (-sum(c[i] * log_ratio(i) for i in part)).backward()
    assert weight.grad.dtype == dtype
    assert whole.abs().max() > 0.01
    assert torch.allclose(weight.grad, whole, rtol=0, atol=tolerance)


def test_decision_advantages_by_hand():
    # c w = (2, 2, -1): root mean square sqrt(9/3) = sqrt(3)
    advantages = decision_advantages(torch.tensor([2.0, -1.0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 1.0]))
    assert advantages.tolist() == pytest.approx([2 / 3**0.5, 2 / 3**0.5, -1 / 3**0.5])
    assert decision_advantages(torch.zeros(2), torch.tensor([0, 1]), torch.ones(2)).tolist() == [0.0, 0.0]
