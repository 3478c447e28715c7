"""The Q term: numbers by hand, the regression by brute force, its gradient, and what it must not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.q import advantages, explained_variance, fit, surrogate

VALID = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
INF = math.inf


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Log-probabilities over the allowed labels, -inf elsewhere, also in rows without any."""
    rows = valid.any(-1, keepdim=True)
    logprobs = torch.log_softmax(logits.masked_fill(~valid & rows, -INF), -1)
    return logprobs.masked_fill(~valid, -INF)


# --- the regression


def test_fit_by_hand():
    # One feature of mean 0 and deviation 1, d = 1, G = 1 + h: sum h^2 = 4, so u = 4 / (4 + 4). What is left is h / 2,
    # of which label 0 has the rows -1, 1, whose v minimises (±(1/2 - a) - b)^2 + 2 (a^2 + b^2): a = 1 / 4, b = 0.
    h = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    q = fit(h, torch.tensor([40, 40, 7, 7]), 1 + h[:, 0], ridge_state=4.0, ridge_label=2.0)
    assert q.u.tolist() == pytest.approx([0.5])
    assert q.labels.tolist() == [7, 40]
    assert q.v.flatten().tolist() == pytest.approx([0.25, 0.0, 0.25, 0.0, 0.0, 0.0])
    # The last two are no label and one that nobody chose: u alone.
    assert q.values(torch.tensor([[2.0]]), torch.tensor([[7, 40, -1, 50]])).tolist() == [
        pytest.approx([2.5, 2.5, 2.0, 2.0])
    ]


def lstsq(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Ridge as a least-squares problem with one more row per coefficient."""
    rows = torch.cat([x, math.sqrt(penalty) * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(x.shape[1])]).unsqueeze(-1)).solution.squeeze(-1)


@pytest.mark.parametrize(("n", "d"), [(60, 4), (12, 40), (60, 20), (1, 3)])  # primal, dual, one for u and one for v
def test_fit_equals_least_squares(n, d):
    h, togo = 3 * drawn(n, d) + 5, drawn(n, seed=1)
    z = torch.arange(n) % 4
    q = fit(h, z, togo, ridge_state=0.3, ridge_label=0.7)
    labels = torch.arange(6).repeat(n, 1)
    deviation = h.std(0, unbiased=False)
    x = (h - h.mean(0)) / deviation.where(deviation > 0, torch.ones(())) / math.sqrt(d)
    u = lstsq(x, togo - togo.mean(), 0.3)
    left, ones = togo - togo.mean() - x @ u, torch.ones(n, 1, dtype=x.dtype)
    expected = (togo.mean() + x @ u).unsqueeze(-1).repeat(1, 6)
    for label in range(min(n, 4)):
        mine = z == label
        v = lstsq(torch.cat([x, ones], -1)[mine], left[mine], 0.7)
        expected[:, label] += torch.cat([x, ones], -1) @ v
    assert torch.allclose(q.values(h, labels), expected, atol=1e-10)


def test_a_feature_that_does_not_vary_counts_for_nothing():
    h = torch.cat([drawn(20, 3), torch.full((20, 1), 0.1, dtype=torch.float64)], -1)
    z = torch.arange(20) % 2
    q = fit(h, z, drawn(20, seed=1))
    elsewhere = h.clone()
    elsewhere[:, 3] = 1e6
    assert torch.equal(q.values(h, z.unsqueeze(-1)), q.values(elsewhere, z.unsqueeze(-1)))


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no decision"):
        fit(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(0))


def test_explained_variance_by_hand():
    togo = torch.tensor([0.0, 2.0])
    assert explained_variance(togo, togo) == 1.0
    assert explained_variance(torch.tensor([1.0, 1.0]), togo) == 0.0
    assert explained_variance(torch.tensor([2.0, 2.0]), togo) == -1.0
    assert explained_variance(togo, torch.ones(2)) is None
    assert explained_variance(togo[:0], togo[:0]) is None


# --- advantages


def test_advantages_by_hand():
    # pi = 3/4, 1/4, Q = 0, 4: V = 1, A = -1, 3 with mean square 3/4 + 9/4 = 3. The forced decision has A = 0 and
    # halves the mean; the word counts in none.
    logprobs = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64).log()
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    q = torch.tensor([[0.0, 4.0], [7.0, INF], [INF, INF]])
    scale = math.sqrt(3 / 2)
    found = advantages(q, logprobs, valid)
    assert found.flatten().tolist() == pytest.approx([-1 / scale, 3 / scale, 0, 0, 0, 0])
    twice = advantages(q, logprobs, valid, everywhere=lambda squares: torch.cat([squares, squares * 0]))
    assert torch.allclose(twice, found * math.sqrt(2))


@pytest.mark.parametrize("rows", [0, 3])
def test_where_nothing_was_chosen_nothing_is_credited(rows):
    """Forced decisions alone: rounding is not blown up to unit scale."""
    valid = torch.tensor([[True, False]]).repeat(rows, 1)
    logprobs = torch.full((rows, 2), -1e-9).masked_fill(~valid, -INF)
    assert (advantages(drawn(rows, 2), logprobs, valid) == 0).all()
    assert advantages(drawn(rows, 2), logprobs, valid).shape == (rows, 2)


@given(st.integers(0, 10**6), st.floats(-1e3, 1e3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_constant_per_state_and_padding_change_nothing(seed, constant, extra):
    q, logits = drawn(3, 3, seed=seed), drawn(3, 3, seed=seed + 1)
    old = policy(logits, VALID)
    new = policy(logits + 0.3 * drawn(3, 3, seed=seed + 2), VALID)
    expected = advantages(q, old, VALID)
    loss = surrogate(new, old, expected, VALID, 0.2, 0.3)
    moved = advantages(q + constant * drawn(3, 1, seed=seed + 3), old, VALID)
    assert torch.allclose(moved, expected, atol=1e-8)

    wide = torch.cat([VALID, torch.zeros(3, extra, dtype=torch.bool)], -1)
    filler = drawn(3, extra, seed=seed + 4)
    padded = advantages(torch.cat([q, filler], -1), torch.cat([old, filler], -1), wide)
    assert torch.equal(padded[:, :3], expected)
    assert (padded[~wide] == 0).all()
    again = surrogate(torch.cat([new, filler - INF], -1), torch.cat([old, filler], -1), padded, wide, 0.2, 0.3)
    assert torch.allclose(again, loss, atol=1e-12)
    assert float(loss[2]) == 0.0


# --- the loss


def test_surrogate_by_hand():
    # rho = 2, 2/3 of pi_old = 1/4, 3/4: 2 is clipped to 1.3 for A = 1; 2/3 is clipped to 0.8 for A = -1.
    logprobs = torch.tensor([[0.5, 0.5]]).log()
    old = torch.tensor([[0.25, 0.75]]).log()
    valid = torch.ones(1, 2, dtype=torch.bool)
    loss = surrogate(logprobs, old, torch.tensor([[1.0, -1.0]]), valid, 0.2, 0.3)
    assert float(loss) == pytest.approx(-(0.25 * 1.3 - 0.75 * 0.8))
    # The other way round nothing is clipped, as the minimum is the worse of the two.
    loss = surrogate(logprobs, old, torch.tensor([[-1.0, 1.0]]), valid, 0.2, 0.3)
    assert float(loss) == pytest.approx(-(-0.25 * 2 + 0.75 * 2 / 3))


def test_gradcheck():
    logits = drawn(3, 3, seed=5).requires_grad_()
    old = policy(drawn(3, 3, seed=6), VALID)
    a = advantages(drawn(3, 3, seed=7), old, VALID)
    assert torch.autograd.gradcheck(lambda x: surrogate(policy(x, VALID), old, a, VALID, 0.2, 0.3), (logits,))


def test_extreme_ratios_have_finite_values_and_gradients():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    valid = torch.ones(1, 2, dtype=torch.bool)
    old = policy(-logits.detach(), valid)
    loss = surrogate(policy(logits, valid), old, torch.tensor([[-1.0, 1.0]]), valid, 0.2, 0.3)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_first_gradient_is_a_preference_between_strategies():
    """1/2 sum_{z,z'} pi pi' (Q_z - Q_z') grad(log pi_z - log pi_z'), written with two loops."""
    logits, q = drawn(2, 3, seed=8).requires_grad_(), drawn(2, 3, seed=9)
    valid = VALID[:2]
    logprobs = policy(logits, valid)
    old = logprobs.detach()
    a = advantages(q, old, valid)
    pi = old.exp()
    rms = (pi * a).abs().sum() / (pi * (q - (pi * q).sum(-1, keepdim=True))).abs().sum()  # one over it
    (ours,) = torch.autograd.grad(-surrogate(logprobs, old, a, valid, 0.2, 0.3).sum(), logits, retain_graph=True)
    preference = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(valid.tolist()):
        allowed = [z for z, given in enumerate(row) if given]
        for z in allowed:
            for other in allowed:
                weight = pi[n, z] * pi[n, other] * (q[n, z] - q[n, other])
                preference = preference + 0.5 * weight * (logprobs[n, z] - logprobs[n, other])
    (expected,) = torch.autograd.grad(preference * rms, logits)
    assert float(expected.abs().max()) > 1e-3
    assert torch.allclose(ours, expected, atol=1e-12)


def test_with_the_true_q_the_expected_update_is_the_policy_gradient():
    """A dialogue of two turns, two strategies each, whose reward depends on both: everything is enumerated."""
    reward = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)  # r(z_0, z_1), paid at the end
    theta = drawn(3, 2, seed=10).requires_grad_()  # logits of the first turn, and of the second after 0 and 1
    logprobs = torch.log_softmax(theta, -1)
    first, second = logprobs[0].exp(), logprobs[1:].exp()
    (truth,) = torch.autograd.grad((first.unsqueeze(-1) * second * reward).sum(), theta, retain_graph=True)

    old = logprobs.detach()
    q = torch.stack([(old[1:].exp() * reward).sum(-1), reward[0], reward[1]])
    valid = torch.ones(3, 2, dtype=torch.bool)
    a = advantages(q, old, valid)
    centred = q - (old.exp() * q).sum(-1, keepdim=True)
    rms = float((centred / a)[0, 0])
    losses = surrogate(logprobs, old, a, valid, 0.2, 0.2)
    visited = torch.cat([torch.ones(1, dtype=torch.float64), old[0].exp()])  # how often each state is met
    (ours,) = torch.autograd.grad(-(visited * losses).sum() * rms, theta)
    assert torch.allclose(ours, truth, atol=1e-12)
