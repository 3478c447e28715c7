"""Support, groups and coefficients of learning from logs."""

import random
from itertools import combinations

import pytest
import torch

from openrlhf_gopo.core.offline import Units, action_coefficients, alike, better, chunked, supported


def test_a_strategy_is_supported_by_the_decisions_of_its_own_task():
    decisions = [("book", "ask")] * 3 + [("book", "query")] * 2 + [("cancel", "query")] * 3
    assert supported(decisions, 3) == {"book": {"ask"}, "cancel": {"query"}}
    assert supported(decisions, 2)["book"] == {"ask", "query"}


def test_goals_are_alike_by_what_they_share():
    features = [frozenset("abc"), frozenset("abd"), frozenset("xyz"), frozenset("abc")]
    assert alike(features, 0.0) == [[0, 1, 2, 3]]
    assert alike(features, 0.5) == [[0, 1, 3], [2]]  # {a, b} of {a, b, c, d}
    assert alike(features, 0.6) == [[0, 3], [1], [2]]
    assert alike([frozenset(), frozenset()], 1.0) == [[0, 1]]


def test_the_better_share_of_each_group():
    assert better([[0, 1, 2], [3, 4]], [0.1, 0.9, 0.5, 0.2, 0.2], 0.5) == {1, 2, 3}
    assert better([[0, 1, 2]], [0.1, 0.9, 0.5], 1.0) == {0, 1, 2}


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_chunks_are_even_parts_of_one_group_and_every_epoch_has_as_many(size):
    groups = [list(range(7)), list(range(7, 20)), [20]]
    drawn = [chunked(groups, size, random.Random(seed)) for seed in range(3)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == chunked(groups, size, random.Random(0))
    for chunks in drawn:
        assert len(chunks) == len(drawn[0])
        assert sorted(i for chunk in chunks for i in chunk) == list(range(21))
        assert all(any(set(chunk) <= set(group) for group in groups) for chunk in chunks)
        assert max(map(len, chunks)) <= size
    # Not 3 + 3 + 1: that one would have nobody to be compared with.
    assert sorted(map(len, chunked([list(range(7))], 3, random.Random(0)))) == [2, 2, 3]


def test_coefficients_are_the_gradient_of_the_written_loss():
    """L = 0.7 mean over pairs of -log sigmoid(beta (m_w - m_l)) - 0.3 mean over imitated actions of log pi."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4])
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    returns = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.1], dtype=torch.float64)
    groups = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    imitated = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    logprobs = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(9, generator=generator, dtype=torch.float64)

    m = [sum(weights[n] * (logprobs[n] - reference[n]) for n in range(9) if owner[n] == u) for u in range(5)]
    pairs = [(a, b) if returns[a] > returns[b] else (b, a) for g in groups for a, b in combinations(g.tolist(), 2)]
    pairs = [(w, low) for w, low in pairs if returns[w] > returns[low]]
    assert len(pairs) == 3
    preference = sum(-torch.log(torch.sigmoid(2.0 * (m[w] - m[low]))) for w, low in pairs) / 3
    loss = 0.7 * preference - 0.3 * logprobs[imitated].mean()
    (gradient,) = torch.autograd.grad(loss, logprobs)

    units = Units(owner, weights, returns, groups, imitated)
    options = {"pref_coef": 0.7, "sft_coef": 0.3, "beta": 2.0}
    p, s, metrics = action_coefficients(logprobs, reference, units, **options)
    assert torch.allclose(-(p + s), gradient, atol=1e-12)
    assert float(gradient.abs().min()) == 0  # the pair of equal returns, not imitated
    assert (metrics["pref_pairs"], metrics["sft_terms"], metrics["pref_groups_without_spread"]) == (3, 4, 1)
    assert metrics["pref_loss"] == pytest.approx(float(preference.detach()))
