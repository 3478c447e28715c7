"""The preference loss against numbers derived by hand and against brute force in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.preference import (
    decision_advantages,
    listwise_preference_loss,
    preference_coefficients,
    preference_pairs,
    trajectory_log_ratio,
    trajectory_preference_loss,
    turn_weights,
)

PAIRINGS = ("all", "best_worst", "adjacent", "listwise")
returns_of_a_group = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6)


def pairs(returns, pairing, margin=0.0):
    return preference_pairs(torch.tensor(returns), pairing=pairing, margin=margin).tolist()


def test_turn_weights_by_hand():
    assert turn_weights(3, mode="sum").tolist() == [1, 1, 1]
    assert turn_weights(4, mode="mean").tolist() == [0.25] * 4
    # g = 1/2, T = 3: w = 1, 1/2 (3/4)/(7/8) = 3/7, 1/4 (1/2)/(7/8) = 1/7
    assert turn_weights(3, mode="dmpo", discount=0.5).tolist() == pytest.approx([1, 3 / 7, 1 / 7])
    assert turn_weights(0, mode="mean").tolist() == []


def test_pairs_by_hand():
    assert pairs([1.0, 3.0, 2.0], "all") == [[1, 2], [1, 0], [2, 0]]
    assert pairs([1.0, 3.0, 2.0], "best_worst") == [[1, 0]]
    assert pairs([1.0, 3.0, 2.0], "adjacent") == [[1, 2], [2, 0]]
    assert pairs([1.0, 3.0, 2.0], "all", margin=1.0) == [[1, 0]]  # a gap of exactly the margin is no preference


@pytest.mark.parametrize("pairing", ["all", "best_worst", "adjacent"])
def test_a_group_without_spread_has_no_pairs(pairing):
    assert pairs([2.0, 2.0, 2.0], pairing) == []
    assert pairs([2.0], pairing) == []
    assert pairs([], pairing) == []  # every trajectory of the group was quarantined


def test_one_turn_two_trajectories_is_dpo():
    # x = 2 (0.5 - (-0.3)) = 1.6, and -log sigmoid(1.6) = log(1 + e^-1.6) = 0.183898...
    loss = trajectory_preference_loss(
        torch.tensor([0.5, -0.3], dtype=torch.float64), torch.tensor([1.0, 0.0]), torch.tensor([[0, 1]]), beta=2.0
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.6)), abs=1e-12)


def test_label_smoothing_and_offset_by_hand():
    m, r = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    x = 1.0 * 1.0 - 0.25 * 2.0
    expected = 0.9 * math.log1p(math.exp(-x)) + 0.1 * math.log1p(math.exp(x))
    loss = trajectory_preference_loss(m, r, torch.tensor([[0, 1]]), beta=1.0, label_smoothing=0.1, offset=0.25)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_pair_weighs_its_gap():
    # Gaps 4 and 1 with g = 1/2 weigh 2 and 1; at m = 0 both losses are log 2, and c of a winner is weight x beta/2 / P:
    # L is the mean over the two pairs, so dL/dm of the winners is -2 x 0.5 / 2 and -1 x 0.5 / 2.
    groups = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    c, metrics = preference_coefficients(
        torch.zeros(4), torch.tensor([5.0, 1.0, 2.0, 3.0]), groups, pairing="all", beta=1.0, gap_weight=0.5
    )
    assert c.tolist() == pytest.approx([0.5, -0.5, -0.25, 0.25])
    assert metrics["pref_loss"] == pytest.approx(1.5 * math.log(2))
    assert metrics["pref_return_gap"] == pytest.approx(2.5)
    assert metrics["pref_terms"] == 2


def test_listwise_compares_what_differs_by_more_than_the_margin():
    # Returns 1, 0.5, 0.499 at margin 0.1 and m = 0: the best alone competes, against both; -(1/2) log(1/3), whose
    # gradient gives (1 - 1/3) / 2 = 1/3 to the best and -1/6 to each of the others.
    returns = torch.tensor([1.0, 0.5, 0.499])
    groups = [torch.arange(3)]
    found, _ = preference_coefficients(torch.zeros(3), returns, groups, pairing="listwise", beta=1.0, margin=0.1)
    assert found.tolist() == pytest.approx([1 / 3, -1 / 6, -1 / 6])


def test_listwise_by_hand():
    # Best first: p = e^2/(e^2+e^1+e^0) * e^1/(e^1+e^0); the loss is -log p over K-1 = 2 choices.
    m = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    e = math.e
    p = e**2 / (e**2 + e + 1) * e / (e + 1)
    loss = listwise_preference_loss(m, torch.tensor([3.0, 2.0, 1.0]), beta=1.0)
    assert loss.item() == pytest.approx(-math.log(p) / 2, abs=1e-12)


def test_coefficients_by_hand():
    # L = log(1 + e^(-2 (m0 - m1))), so c = -dL/dm = (2 sigmoid(0), -2 sigmoid(0)) = (1, -1) at m = 0.
    c, metrics = preference_coefficients(
        torch.zeros(2), torch.tensor([1.0, 0.0]), [torch.arange(2)], pairing="all", beta=2.0
    )
    assert c.tolist() == pytest.approx([1.0, -1.0])
    assert metrics["pref_loss"] == pytest.approx(math.log(2))
    assert metrics["pref_accuracy"] == 0.5  # a tie counts half
    assert metrics["pref_pairs"] == 1


def test_a_flat_group_is_counted_and_pulls_nowhere():
    c, metrics = preference_coefficients(
        torch.zeros(4), torch.ones(4), [torch.arange(2), torch.arange(2, 4)], pairing="all", beta=1.0
    )
    assert c.tolist() == [0.0] * 4
    assert metrics["pref_groups_without_spread"] == 2


def test_a_trajectory_outside_every_group_gets_no_coefficient():
    c, _ = preference_coefficients(
        torch.zeros(3), torch.tensor([1.0, 0.0, 99.0]), [torch.tensor([0, 1])], pairing="all", beta=1.0
    )
    assert c[2] == 0
    assert c[0] > 0


@given(returns_of_a_group, st.sampled_from(PAIRINGS), st.randoms())
@settings(max_examples=60, deadline=None)
def test_coefficients_follow_a_permutation_of_the_group(returns, pairing, random):
    if pairing in ("best_worst", "adjacent") and len(set(returns)) < len(returns):
        return  # ties are broken by position there
    size = len(returns)
    m = torch.tensor([random.uniform(-1, 1) for _ in range(size)], dtype=torch.float64)
    r = torch.tensor(returns, dtype=torch.float64)
    order = torch.tensor(random.sample(range(size), size))
    straight, _ = preference_coefficients(m, r, [torch.arange(size)], pairing=pairing, beta=0.7)
    permuted, _ = preference_coefficients(m[order], r[order], [torch.arange(size)], pairing=pairing, beta=0.7)
    assert torch.allclose(straight[order], permuted, atol=1e-12)
    assert straight.sum().abs() < 1e-12  # preferences push apart, never all up


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_micro_batched_gradient_equals_one_big_batch(pairing, micro_batch, dtype, tolerance):
    """Weighted back-propagation of one trajectory at a time = autograd of the written loss over all of them."""
    torch.manual_seed(0)
    lengths = [3, 1, 4, 2, 5, 2]
    weight = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    inputs = [torch.randn(n, 4, dtype=dtype) for n in lengths]
    choices = [torch.randint(0, 5, (n,)) for n in lengths]
    reference = [torch.randn(n, dtype=dtype) for n in lengths]
    returns = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3, 0.2], dtype=dtype)
    groups = [torch.arange(3), torch.arange(3, 6)]
    noise = {} if pairing == "listwise" else {"label_smoothing": 0.1, "offset": 0.3}

    def log_ratio(i):
        logprobs = torch.log_softmax(inputs[i] @ weight, -1).gather(-1, choices[i].unsqueeze(-1)).squeeze(-1)
        w = turn_weights(lengths[i], mode="dmpo", discount=0.9).to(dtype)
        return trajectory_log_ratio(logprobs, reference[i], torch.zeros(lengths[i], dtype=torch.long), w, 1)[0]

    m = torch.stack([log_ratio(i) for i in range(6)])
    terms = []
    for group in groups:
        if pairing == "listwise":
            terms.append(listwise_preference_loss(m[group], returns[group], beta=0.5).reshape(1))
        else:
            chosen = preference_pairs(returns[group], pairing=pairing)
            terms.append(trajectory_preference_loss(m[group], returns[group], chosen, beta=0.5, **noise))
    (whole,) = torch.autograd.grad(torch.cat(terms).mean(), weight)

    c, _ = preference_coefficients(m, returns, groups, pairing=pairing, beta=0.5, **noise)
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
