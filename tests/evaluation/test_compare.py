import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.compare import FLIPS, compare, holm, paired_difference, sign_flip_p
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.types import Goal, StopReason, Trajectory

p_values = st.lists(st.floats(0, 1), max_size=8)
differences = st.lists(st.integers(-20, 20).map(float), max_size=9)


def dialogue(goal_id, tse, intent="return"):
    goal = Goal(goal_id, intent, "context", {"solve": 1.0})
    return Trajectory(goal, 0, 0, [], StopReason.CLOSED, rewards={"tse": tse})


def policy(**tse_of_goal):
    return summarise([dialogue(goal, tse) for goal, tse in tse_of_goal.items()])


def test_a_constant_gain_has_a_degenerate_paired_interval():
    before = summarise([dialogue("a", 10), dialogue("b", 50), dialogue("c", 90), dialogue("only before", 0)])
    after = summarise([dialogue("c", 95), dialogue("b", 55), dialogue("a", 15)])  # the order must not matter
    difference = paired_difference(before, after)
    tse = difference.metrics["tse"]
    assert (tse.mean, tse.low, tse.high, tse.goals) == (5.0, 5.0, 5.0, 3)
    assert tse.excludes_zero
    assert (difference.goals, difference.unpaired) == (3, 1)


def test_the_difference_is_after_minus_before_and_keeps_its_noise():
    before = summarise([dialogue("a", 0), dialogue("b", 0)])
    after = summarise([dialogue("a", 10), dialogue("b", -30)])
    tse = paired_difference(before, after).metrics["tse"]
    assert (tse.mean, tse.low, tse.high) == (-10.0, -30.0, 10.0)
    assert not tse.excludes_zero


def test_policies_without_a_common_goal_cannot_be_paired():
    with pytest.raises(DataError, match="no goal id"):
        paired_difference(summarise([dialogue("a", 1)]), summarise([dialogue("b", 1)]))


def test_one_id_with_two_intents_is_not_one_goal():
    with pytest.raises(DataError, match="goal 'a' has intent 'return' in one and 'hotel' in the other"):
        paired_difference(summarise([dialogue("a", 1)]), summarise([dialogue("a", 1, intent="hotel")]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 1.0),  # + and - are equally far from zero
        ([1.0, 2.0], 0.5),  # 3, 1, -1, -3
        ([1.0, 2.0, 4.0], 0.25),
        ([3.0, -1.0], 1.0),  # the sums 4, 2, -2, -4: all as far as 2
        ([4.0, 2.0, -1.0], 0.5),  # 7, 5, 3, 1 and their negatives: 7 and 5 reach 5
        ([0.0, 0.0, 1.0, 2.0], 0.5),  # a zero has no sign
        ([0.0, 0.0], 1.0),
        ([], 1.0),
        ([0.1, 0.2, -0.1], 0.75),  # 0.2 is reached by 6 of 8; two of these are ties that rounding would break
        ([0.1] * 10, 2 / 2**10),
    ],
)
def test_p_values_by_hand(values, expected):
    assert sign_flip_p(values) == expected


@given(differences)
def test_the_exact_p_value_counts_every_pattern(values):
    sums = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = sum(abs(s) >= abs(sum(values)) for s in sums) / len(sums)
    assert sign_flip_p(values) == pytest.approx(expected)


@given(differences)
def test_p_ignores_direction_order_and_scale(values):
    p = sign_flip_p(values)
    assert 0 < p <= 1
    assert sign_flip_p([-v for v in values]) == sign_flip_p(values[::-1]) == sign_flip_p([8 * v for v in values]) == p


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_random_flips_agree_with_scipy(shift):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(7).normal(shift, 1.0, 60)
    ours = sign_flip_p(values)
    reference = stats.permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=FLIPS
    ).pvalue
    assert ours == pytest.approx(reference, abs=4 * math.sqrt(2 * max(reference, 1e-3) / FLIPS))


def test_a_sure_gain_has_the_smallest_p_that_the_flips_can_show():
    assert sign_flip_p([1.0] * 40) == 1 / (FLIPS + 1)


def test_p_is_uniform_where_the_policies_are_equal():
    rng = np.random.default_rng(3)
    found = np.array([sign_flip_p(rng.normal(0, 1, 12)) for _ in range(400)])
    for level in (0.05, 0.2, 0.5):
        assert (found <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 400))


def test_holm_by_hand():
    # 4 x 0.005 = 0.02; 3 x 0.01 = 0.03; 2 x 0.03 = 0.06; 1 x 0.04 = 0.04, raised to the 0.06 before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def step_down(p, alpha):
    """Holm's own wording: reject from the smallest on while p <= alpha / (hypotheses left); then stop."""
    rejected = set()
    for left, index in zip(range(len(p), 0, -1), sorted(range(len(p)), key=lambda i: p[i]), strict=True):
        if p[index] > alpha / left:
            break
        rejected.add(index)
    return rejected


@given(p_values, st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    adjusted = holm(p)
    if all(abs(a - alpha) > 1e-9 for a in adjusted):  # at equality rounding decides
        assert {i for i, a in enumerate(adjusted) if a <= alpha} == step_down(p, alpha)


@given(p_values)
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p):
    adjusted = holm(p)
    for i, value in enumerate(adjusted):
        assert p[i] <= value <= min(1.0, len(p) * p[i]) + 1e-12
        assert all(value <= adjusted[j] for j in range(len(p)) if p[i] <= p[j])


def test_policies_are_corrected_for_each_other_per_metric():
    goals = "abcdefgh"
    base = policy(**dict.fromkeys(goals, 10.0))
    better = policy(**dict.fromkeys(goals, 20.0))
    mixed = policy(**{goal: 10.0 + (5.0 if goal < "e" else -5.0) for goal in goals})
    results = {"base": base, "better": better, "mixed": mixed, "else": policy(z=3.0)}
    found, refused = compare(results, dict.fromkeys(["better", "mixed", "else"], "base"))
    assert list(found) == ["better", "mixed"]
    assert (found["better"].p["tse"], found["mixed"].p["tse"]) == (2 / 2**8, 1.0)
    assert (found["better"].p_holm["tse"], found["mixed"].p_holm["tse"]) == (2 * 2 / 2**8, 1.0)
    assert list(refused) == ["else"]
    assert "else stands alone, without a difference to base: cannot pair 8 goals with 1" in refused["else"]
