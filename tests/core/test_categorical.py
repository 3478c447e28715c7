"""The masked categorical: hand-derived numbers, padding, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.core.categorical import PAD, chosen_logprobs, masked_categorical_logprobs, pad_allowed


def test_by_hand_with_temperature():
    # Labels 1 and 3 with logits 2 and 0 at tau = 2: the gap is 1, so p = 1 / (1 + e^-1).
    logits = torch.tensor([[9.0, 2.0, 9.0, 0.0]], dtype=torch.float64)
    logprobs, entropy = masked_categorical_logprobs(logits, pad_allowed([[1, 3]]), temperature=2.0)
    p = 1 / (1 + math.exp(-1))
    assert logprobs[0].exp().tolist() == pytest.approx([p, 1 - p])
    assert entropy.item() == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)))


def test_one_allowed_label_is_certain():
    logprobs, entropy = masked_categorical_logprobs(torch.randn(1, 7), pad_allowed([[4]], width=3))
    assert logprobs[0].tolist() == [0.0, -math.inf, -math.inf]
    assert entropy.item() == 0.0


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_padding_changes_nothing_and_rows_sum_to_one(allowed):
    torch.manual_seed(0)
    logits = torch.randn(len(allowed), 10, dtype=torch.float64)
    wide, wide_entropy = masked_categorical_logprobs(logits, pad_allowed(allowed, width=9))
    for row, labels in enumerate(allowed):
        brute = torch.log_softmax(logits[row, labels], -1)
        assert torch.allclose(wide[row, : len(labels)], brute)
        assert wide_entropy[row].item() == pytest.approx(float(-(brute.exp() * brute).sum()))
    assert torch.allclose(wide.exp().sum(-1), torch.ones(len(allowed), dtype=torch.float64))


def test_gradients_are_finite_and_correct_with_padding():
    torch.manual_seed(1)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    allowed = pad_allowed([[0, 1], [2, 3, 4], [5]])
    chosen = torch.tensor([1, 2, 5])

    def both(x):
        logprobs, entropy = masked_categorical_logprobs(x, allowed, 0.7)
        return chosen_logprobs(logprobs, allowed, chosen), entropy

    assert torch.autograd.gradcheck(both, (logits,))


def test_a_choice_outside_the_allowed_set_is_refused():
    logprobs, _ = masked_categorical_logprobs(torch.zeros(2, 5), pad_allowed([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="decision 1: token 4"):
        chosen_logprobs(logprobs, pad_allowed([[0, 1], [2, 3]]), torch.tensor([0, 4]))


def test_an_empty_allowed_set_is_refused():
    with pytest.raises(ValueError, match="no allowed label"):
        masked_categorical_logprobs(torch.zeros(1, 5), torch.full((1, 2), PAD))
