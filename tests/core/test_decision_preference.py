"""Preferences between the decisions of one turn, against numbers derived by hand and autograd of the written loss."""

from itertools import combinations

import pytest
import torch
from torch.nn.functional import logsigmoid

from openrlhf_gopo.core.decision_preference import decision_preference


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_one_place_by_hand():
    # a with 3 beats b with 1 and c with 2, c beats b: 1/2 for each pair won, -1/2 for each lost, over the 3 pairs.
    found = decision_preference(t(3, 1, 2), ["a", "b", "c"], [("goal", 0)] * 3)
    assert found.tolist() == pytest.approx([1 / 3, -1 / 3, 0])


def test_equal_choices_equal_returns_and_other_places_are_no_pairs():
    # a and a; 1 and 1 up to rounding; another turn, another goal; None, which no turn carried out, twice.
    places = [("g", 0), ("g", 0), ("g", 0), ("g", 1), ("h", 0), None, None]
    togo = t(3, 1, 1 + 5e-10, 0, 0, 9, 8)
    found = decision_preference(togo, ["a", "a", "b", "c", "d", "e", "f"], places)
    # The one pair: the first a against b.
    assert found.tolist() == [0.5, 0, -0.5, 0, 0, 0, 0]


def test_pairs_of_all_places_share_one_mean():
    # Two places of one pair each: 1/2 over 2.
    found = decision_preference(t(1, 0, 0, 1), ["a", "b", "a", "b"], [0, 0, 1, 1])
    assert found.tolist() == [0.25, -0.25, -0.25, 0.25]


def test_without_a_pair_there_is_nothing():
    assert decision_preference(t(1, 1), ["a", "b"], [0, 0]).tolist() == [0, 0]
    assert decision_preference(t(), [], []).tolist() == []


def test_it_is_the_gradient_of_the_written_loss_at_the_sampler():
    generator = torch.Generator().manual_seed(0)
    togo = torch.randint(0, 4, (12,), generator=generator).double()
    chosen = torch.randint(0, 3, (12,), generator=generator).tolist()
    places = torch.randint(0, 3, (12,), generator=generator).tolist()
    logprobs = torch.randn(12, generator=generator, dtype=torch.float64)
    now = logprobs.clone().requires_grad_()
    m = now - logprobs
    pairs = [(i, j) for i, j in combinations(range(12), 2) if places[i] == places[j] and chosen[i] != chosen[j]]
    pairs = [(i, j) if togo[i] > togo[j] else (j, i) for i, j in pairs if togo[i] != togo[j]]
    assert len(pairs) > 5
    (gradient,) = torch.autograd.grad(torch.stack([-logsigmoid(m[w] - m[low]) for w, low in pairs]).mean(), now)
    assert torch.allclose(decision_preference(togo, chosen, places), -gradient, rtol=0, atol=1e-12)
