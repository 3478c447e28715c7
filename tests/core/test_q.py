"""The credit term ``q`` against least squares, numbers derived by hand and numerical gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.q import explained, fit_q, mean_square, q_advantages, q_surrogate

PAD = -1


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def brute_ridge(features, targets, penalty):
    """argmin |X w - y|^2 + penalty |w|^2 as least squares of the system with sqrt(penalty) I below it."""
    eye = torch.eye(features.shape[1], dtype=torch.float64)
    system = torch.cat([features, penalty**0.5 * eye])
    return torch.linalg.lstsq(system, torch.cat([targets, eye.new_zeros(len(eye))]).unsqueeze(1)).solution.squeeze(1)


@pytest.mark.parametrize(("decisions", "width"), [(40, 3), (9, 12), (1, 4)])  # more rows than features, and fewer
def test_the_fit_is_two_ridge_regressions(decisions, width):
    generator = torch.Generator().manual_seed(0)
    hidden = 3.0 + torch.randn(decisions, width, generator=generator)
    chosen = torch.randint(5, 8, (decisions,), generator=generator)
    togo = torch.randn(decisions, generator=generator, dtype=torch.float64)
    q = fit_q(hidden, chosen, togo, ridge_shared=0.2, ridge_own=0.7)

    standard = (hidden.double() - hidden.double().mean(0)) / (hidden.double().std(0, correction=0) + 1e-6)
    features = torch.cat([standard, torch.ones(decisions, 1, dtype=torch.float64)], dim=1)
    shared = brute_ridge(features, togo, 0.2 * (width + 1))
    assert torch.allclose(q.shared, shared, rtol=0, atol=1e-9)
    left = togo - features @ shared
    assert set(q.own) == set(chosen.tolist())
    values = q.values(hidden, torch.tensor([[5, 6, 7, 4, PAD]]).expand(decisions, -1))
    for column, label in enumerate((5, 6, 7)):
        mine = chosen == label
        own = brute_ridge(features[mine], left[mine], 0.7 * (width + 1)) if mine.any() else torch.zeros_like(shared)
        assert torch.allclose(values[:, column], features @ (shared + own), rtol=0, atol=1e-9)
    assert torch.allclose(values[:, 3], features @ shared, rtol=0, atol=1e-9)  # a label that nobody chose


def test_explained_by_hand():
    # The variance of (0, 2) is 1; errors (0.5, 0.5) leave 0.25 of it, the mean leaves all, (2, 0) is off by 4.
    assert explained(t(0.5, 1.5), t(0, 2)) == pytest.approx(0.75)
    assert explained(t(1, 1), t(0, 2)) == 0.0
    assert explained(t(2, 0), t(0, 2)) == pytest.approx(-3.0)
    assert explained(t(1, 1), t(1, 1)) == explained(t(), t()) == 0.0


PROBABILITIES = t(0.5, 0.25, 0.25).log().unsqueeze(0)


def test_advantages_by_hand():
    # pi = (1/2, 1/4, 1/4), Q = (2, 4, 0): their mean is 2. The mean square is (0 + 4 + 4) / 4 = 2.
    everything = torch.ones(1, 3, dtype=torch.bool)
    found = q_advantages(t(2, 4, 0).unsqueeze(0), PROBABILITIES, everything)
    assert found.tolist() == [[0, 2, -2]]
    assert float(mean_square(found, PROBABILITIES, everything)) == pytest.approx(2)


def test_padding_has_no_advantage_and_no_weight():
    logprobs = torch.cat([PROBABILITIES, torch.full((1, 1), float("-inf"), dtype=torch.float64)], dim=1)
    valid = torch.tensor([[True, True, True, False]])
    for filler in (7.0, float("nan"), float("inf")):
        found = q_advantages(t(2, 4, 0, filler).unsqueeze(0), logprobs, valid)
        assert found.tolist() == [[0, 2, -2, 0]]
        assert float(mean_square(found, logprobs, valid)) == pytest.approx(2)
    now = logprobs.clone().requires_grad_()
    loss = q_surrogate(now, logprobs, found, valid)
    loss.sum().backward()
    assert float(loss) == pytest.approx(0)
    assert now.grad.tolist() == [[0, -0.5, 0.5, 0]]  # -pi A


def test_a_word_of_a_plan_has_no_loss():
    nothing = torch.full((1, 3), float("-inf"), dtype=torch.float64)
    now = nothing.clone().requires_grad_()
    loss = q_surrogate(now, nothing, torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    loss.sum().backward()
    assert loss.tolist() == [0]
    assert now.grad.tolist() == [[0, 0, 0]]


def test_the_surrogate_by_hand():
    # pi_old = (1/2, 1/4, 1/4) and A = (1, 2, -4), of mean 0. pi = (0.7, 0.2, 0.1): rho = (1.4, 0.8, 0.4).
    # Clipped to [0.8, 1.1]: min(1.4, 1.1) 1/2 + 0.8 x 2 x 1/4 + min(0.4 x -4, 0.8 x -4) 1/4 = 0.55 + 0.4 - 0.8 = 0.15.
    now = t(0.7, 0.2, 0.1).log().unsqueeze(0).requires_grad_()
    everything = torch.ones(1, 3, dtype=torch.bool)
    loss = q_surrogate(now, PROBABILITIES, t(1, 2, -4).unsqueeze(0), everything, (0.2, 0.1))
    assert loss.tolist() == pytest.approx([-0.15])
    loss.sum().backward()
    # Only the second is inside its bounds: -pi_old rho A = -1/4 x 0.8 x 2; the others are held.
    assert now.grad.tolist()[0] == pytest.approx([0, -0.4, 0])


def surrogate_of(valid, advantages, old):
    def loss(logits):
        now = torch.log_softmax(logits.masked_fill(~valid, float("-inf")), dim=1)
        return q_surrogate(now, old, advantages, valid)

    return loss


def test_the_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    old = torch.log_softmax(logits.masked_fill(~valid, float("-inf")), dim=1)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    advantages = q_advantages(values, old, valid)
    moved = (logits + 0.3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(surrogate_of(valid, advantages, old), moved)


@given(st.integers(2, 5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_at_the_sampler_it_is_a_preference_between_all_strategies_of_a_state(labels, seed):
    """grad(-L) = 1/2 sum_{z,z'} pi pi' (A_z - A_z') grad(log pi_z - log pi_z'), and sum_z Q(s, z) grad pi_z, whatever
    constant is added to the Q of a state."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, labels, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.randn(1, labels, generator=generator, dtype=torch.float64)
    now = torch.log_softmax(logits, dim=1)
    old, everything = now.detach(), torch.ones(1, labels, dtype=torch.bool)
    advantages = q_advantages(values, old, everything)
    assert torch.allclose(advantages, q_advantages(values + 3.7, old, everything), rtol=0, atol=1e-12)
    (ours,) = torch.autograd.grad(-q_surrogate(now, old, advantages, everything).sum(), logits, retain_graph=True)

    pi, a = old[0].exp(), advantages[0]
    pairs = [pi[x] * pi[y] * (a[x] - a[y]) * (now[0, x] - now[0, y]) / 2 for x in range(labels) for y in range(labels)]
    (pairwise,) = torch.autograd.grad(torch.stack(pairs).sum(), logits, retain_graph=True)
    (policy,) = torch.autograd.grad((now.exp() * values).sum(), logits)
    assert torch.allclose(ours, pairwise, rtol=0, atol=1e-12)
    assert torch.allclose(ours, policy, rtol=0, atol=1e-12)
