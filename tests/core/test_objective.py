"""Properties of the trajectory preference loss: DPO as its smallest case, symmetries, ties, shards over ranks."""

from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo import platform
from openrlhf_gopo.core.categorical import chosen_logprobs, masked_categorical_logprobs, pad_allowed
from openrlhf_gopo.core.preference import (
    decision_advantages,
    preference_coefficients,
    trajectory_log_ratio,
    trajectory_preference_loss,
    turn_weights,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
log_ratio = st.floats(-3, 3)
few_returns = st.sampled_from([0.0, 0.25, 0.5, 1.0])
group = st.lists(st.tuples(log_ratio, few_returns), min_size=1, max_size=5)  # (m, R) of each trajectory


def coefficients(m, returns, groups=None, beta=0.7):
    m, returns = torch.as_tensor(m, dtype=torch.float64), torch.as_tensor(returns, dtype=torch.float64)
    groups = [torch.arange(len(m))] if groups is None else groups
    return preference_coefficients(m, returns, groups, beta=beta)


def four_logprobs(dtype):
    """Policy and reference log-probabilities of the one choice of 5 winners and 5 losers."""
    torch.manual_seed(0)
    return [-3 * torch.rand(5, dtype=dtype) for _ in range(4)]


def our_dpo(chosen, rejected, ref_chosen, ref_rejected, **kwargs):
    """Five groups of T = 1, K = 2: loss and its gradient in the policy's log-probabilities, (loss, (5,), (5,))."""
    logprobs = torch.cat([chosen, rejected]).requires_grad_(True)
    weights = turn_weights(1, mode="mean").repeat(10).to(chosen.dtype)
    m = trajectory_log_ratio(logprobs, torch.cat([ref_chosen, ref_rejected]), torch.arange(10), weights, 10)
    returns = torch.tensor([1.0] * 5 + [0.0] * 5, dtype=chosen.dtype)
    pairs = torch.tensor([[i, i + 5] for i in range(5)])
    loss = trajectory_preference_loss(m, pairs, **kwargs).mean()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    groups = list(pairs)
    ours, metrics = preference_coefficients(m, returns, groups, **kwargs)
    assert torch.allclose(-ours.to(gradient.dtype), gradient, rtol=0, atol=TOLERANCE[chosen.dtype])
    assert metrics["pref_loss"] == pytest.approx(loss.item(), abs=TOLERANCE[chosen.dtype])
    return loss, gradient[:5], gradient[5:]


@pytest.mark.stack
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_decision_two_trajectories_is_openrlhfs_dpo(dtype):
    platform.activate()
    upstream = pytest.importorskip("openrlhf.models.loss").DPOLoss(beta=0.3)
    chosen, rejected, *reference = four_logprobs(dtype)
    ours = our_dpo(chosen, rejected, *reference, beta=0.3)
    chosen, rejected = chosen.requires_grad_(True), rejected.requires_grad_(True)
    loss = upstream(chosen, rejected, *reference)[0]
    for mine, theirs in zip(ours, (loss, *torch.autograd.grad(loss, (chosen, rejected))), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.stack
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_decision_two_trajectories_is_trls_dpo(dtype):
    """TRL's loss is a private method over a model's output: everything but the formula is a stand-in."""
    platform.activate()
    trainer = pytest.importorskip("trl", minversion="1.16").DPOTrainer  # earlier ones compute the loss elsewhere
    chosen, rejected, ref_chosen, ref_rejected = four_logprobs(dtype)
    ours = our_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    logprobs = torch.cat([chosen, rejected]).reshape(10, 1).requires_grad_(True)
    this = MagicMock(beta=0.3, loss_types=["sigmoid"], loss_weights=[1.0], f_divergence_type="reverse_kl")
    this.configure_mock(ld_alpha=None, precompute_ref_logps=True, use_weighting=False, aux_loss_enabled=False)
    this.accelerator.gather_for_metrics = lambda value: value
    this.accelerator.device = "cpu"
    ones = torch.ones(10, 2, dtype=torch.long)
    inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": torch.tensor([[0, 1]] * 10)}
    output = MagicMock(log_probs=logprobs, entropy=logprobs, mean_logits=logprobs, is_top1=logprobs > 0)
    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    loss = trainer._compute_loss(this, lambda **_: output, inputs, False)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    for mine, theirs in zip(ours, (loss, gradient[:5, 0], gradient[5:, 0]), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=TOLERANCE[dtype])


@given(st.lists(st.tuples(few_returns, st.lists(log_ratio, min_size=1, max_size=4)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_ties_alone_pull_nowhere_and_are_counted(flat_groups):
    m = [value for _, values in flat_groups for value in values]
    returns = [tied for tied, values in flat_groups for _ in values]
    groups = list(torch.arange(len(m)).split([len(values) for _, values in flat_groups]))
    c, metrics = coefficients(m, returns, groups)
    assert c.tolist() == [0.0] * len(m)
    assert decision_advantages(c, torch.arange(len(m)), torch.ones(len(m))).tolist() == [0.0] * len(m)
    assert metrics["pref_groups_without_spread"] == len(groups)
    assert metrics["pref_pairs"] == metrics["pref_loss"] == 0
    assert metrics["pref_accuracy"] == 0.5


@given(log_ratio, log_ratio)
@settings(max_examples=60, deadline=None)
def test_swapping_winner_and_loser_flips_the_sign(m_first, m_second):
    # c_first = beta s(-x) when it wins and -beta s(x) when it loses: with s(x) + s(-x) = 1 the two differ by beta,
    # whatever the policy has learnt.
    wins, _ = coefficients([m_first, m_second], [1.0, 0.0])
    loses, _ = coefficients([m_first, m_second], [0.0, 1.0])
    assert (wins - loses).tolist() == pytest.approx([0.7, -0.7])
    assert wins[0] > 0 > loses[0]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6, unique=True))
@settings(max_examples=60, deadline=None)
def test_at_the_sampler_the_opposite_preferences_have_the_opposite_gradient(returns):
    straight, _ = coefficients([0.0] * len(returns), returns)
    opposite, _ = coefficients([0.0] * len(returns), [-r for r in returns])
    assert torch.allclose(straight, -opposite, rtol=0, atol=1e-12)
    assert straight.abs().max() > 0


@given(st.lists(st.integers(1, 4), min_size=2, max_size=8), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_forced_turns_have_no_gradient(sizes, seed):
    """Where one label is allowed the gradient is exactly zero, and the other turns' does not depend on it."""
    generator = torch.Generator().manual_seed(seed)
    forced = torch.tensor([size == 1 for size in sizes])
    owner = torch.arange(len(sizes)) % 2
    full = torch.randn(len(sizes), 6, generator=generator, dtype=torch.float64)

    def gradient(rows):
        logits = full[rows].clone().requires_grad_(True)
        allowed = pad_allowed([list(range(sizes[row])) for row in rows.tolist()], width=4)
        logprobs, _ = masked_categorical_logprobs(logits, allowed)
        logprobs = chosen_logprobs(logprobs, allowed, torch.zeros(len(rows), dtype=torch.long))
        m = trajectory_log_ratio(logprobs, torch.zeros_like(logprobs), owner[rows], torch.ones(len(rows)), 2)
        loss = trajectory_preference_loss(m, torch.tensor([[0, 1]]), beta=0.7).mean()
        return torch.autograd.grad(loss, logits)[0]

    everything = gradient(torch.arange(len(sizes)))
    assert (everything[forced] == 0).all()
    assert (everything[~forced].abs().amax(dim=1) > 0).all()
    assert torch.allclose(everything[~forced], gradient((~forced).nonzero().flatten()), rtol=0, atol=1e-12)


@given(group, st.lists(st.booleans(), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_quarantined_trajectory_gets_nothing_and_moves_nothing(trajectories, flags):
    m, returns = (torch.tensor(column, dtype=torch.float64) for column in zip(*trajectories, strict=True))
    quarantined = torch.tensor(flags[: len(m)])
    kept = (~quarantined).nonzero().flatten()
    alone, expected = coefficients(m[kept], returns[kept])
    # Its return and log-ratio are whatever the failure left behind.
    c, metrics = coefficients(m.masked_fill(quarantined, 1e9), returns.masked_fill(quarantined, float("nan")), [kept])
    assert (c[quarantined] == 0).all()
    assert torch.equal(c[kept], alone)
    assert metrics == expected


def test_shards_by_hand():
    # m = 0, beta = 1: every pair pulls by 1/2. Group A (2, 1, 0) has 3 pairs, group B (1, 0) has 1, together 4.
    # Together: A = 1/2 (2, 0, -2) / 4 = (1/4, 0, -1/4), B = 1/2 (1, -1) / 4 = (1/8, -1/8).
    # Alone: A = (1/3, 0, -1/3), B = (1/2, -1/2); weighted by 3/4 and 1/4 they are the numbers above.
    groups = [torch.arange(3), torch.arange(3, 5)]
    c, _ = coefficients([0.0] * 5, [2.0, 1.0, 0.0, 1.0, 0.0], groups, beta=1.0)
    assert c.tolist() == pytest.approx([1 / 4, 0, -1 / 4, 1 / 8, -1 / 8])
    alone = [coefficients([0.0] * 5, [2.0, 1.0, 0.0, 1.0, 0.0], [g], beta=1.0) for g in groups]
    assert [metrics["pref_pairs"] for _, metrics in alone] == [3, 1]
    assert (3 / 4 * alone[0][0] + 1 / 4 * alone[1][0]).tolist() == pytest.approx(c.tolist())


@given(st.lists(group, min_size=2, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_two_ranks_sum_to_one_big_batch(groups, data):
    """Each rank its own groups, its mean weighted by its share of all terms: the sum is the batch's gradient."""
    ranks = [data.draw(st.integers(0, 1)) for _ in groups]
    m, returns = zip(*[trajectory for trajectories in groups for trajectory in trajectories], strict=True)
    indices = list(torch.arange(len(m)).split([len(trajectories) for trajectories in groups]))

    def shard(mine):
        c, metrics = coefficients(m, returns, mine)
        return c, metrics["pref_pairs"], metrics["pref_loss"]

    whole, terms, loss = shard(indices)
    parts = [shard([g for g, rank in zip(indices, ranks, strict=True) if rank == r]) for r in (0, 1)]
    assert sum(count for _, count, _ in parts) == terms
    assert torch.allclose(sum(count / max(terms, 1) * c for c, count, _ in parts), whole, rtol=0, atol=1e-12)
    assert sum(count / max(terms, 1) * value for _, count, value in parts) == pytest.approx(loss, abs=1e-12)
