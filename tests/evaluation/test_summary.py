import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.summary import bootstrap, metric_values, paired_difference, slices, summarise
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn


def dialogue(goal_id, tse=None, stop=StopReason.CLOSED, intent="return", persona=None, turns=(), **rewards):
    goal = Goal(goal_id, intent, "context", {"solve": 1.0}, persona=persona or {})
    rewards = rewards if tse is None else {"tse": tse, **rewards}
    return Trajectory(goal, 0, 0, list(turns), stop, rewards=rewards)


def turn(engagement, completed=()):
    return Turn("hello", ("a",), "a", "hi", engagement=engagement, completed=completed)


def test_every_goal_counts_the_same_whatever_its_number_of_samples():
    summary = summarise([dialogue("a", 0), dialogue("a", 0), dialogue("a", 30), dialogue("b", 100)])
    assert summary.metrics["tse"].mean == 55.0  # (10 + 100) / 2, where the mean over samples is 32.5
    assert summary.by_goal["tse"] == {"a": 10.0, "b": 100.0}
    assert (summary.goals, summary.dialogues, summary.failures) == (2, 4, 0)


def test_the_interval_is_degenerate_when_all_goals_are_equal():
    interval = bootstrap([42.0] * 7)
    assert (interval.mean, interval.low, interval.high, interval.goals) == (42.0, 42.0, 42.0, 7)


def test_two_goals_give_their_own_values_as_bounds():
    # Resample means are 0, 50, 100 with probabilities 1/4, 1/2, 1/4: both tails exceed 2.5%.
    interval = bootstrap([0.0, 100.0])
    assert (interval.mean, interval.low, interval.high) == (50.0, 0.0, 100.0)


def test_the_interval_has_the_width_that_theory_gives():
    # 200 goals, half 0 and half 1: the mean's standard error is 0.5 / sqrt(200), times 1.96 = 0.0693.
    interval = bootstrap([0.0, 1.0] * 100)
    assert interval.low == pytest.approx(0.5 - 0.0693, abs=0.008)
    assert interval.high == pytest.approx(0.5 + 0.0693, abs=0.008)


def test_goals_are_resampled_and_not_dialogues():
    trajectories = [dialogue(goal, tse) for goal, tse in (("a", 0), ("b", 100)) for _ in range(50)]
    interval = summarise(trajectories).metrics["tse"]
    assert (interval.low, interval.high) == (0.0, 100.0)  # 100 independent dialogues would give about 40 to 60


def test_one_goal_has_no_interval():
    interval = bootstrap([3.0])
    assert interval.mean == 3.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.excludes_zero


def test_bootstrap_refuses_nothing():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_bounds_are_ordered_and_inside_the_data(values):
    interval = bootstrap(values, resamples=50)
    slack = 1e-9
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack


def test_the_seed_decides_the_interval():
    values = [1.0, 5.0, 7.0, 30.0, 2.0]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, resamples=100, seed=3) != bootstrap(values, resamples=100, seed=4)


def test_failures_are_counted_and_enter_no_metric():
    summary = summarise([dialogue("a", 80), dialogue("b", 0, StopReason.FAILED), dialogue("c", 0, StopReason.FAILED)])
    assert summary.metrics["tse"].mean == 80.0
    assert (summary.goals, summary.dialogues, summary.failures) == (1, 1, 2)
    assert summary.stops == {"closed": 1.0}


def test_stop_reasons_are_shares_of_the_dialogues_that_did_not_fail():
    stops = [StopReason.COMPLETED] * 3 + [StopReason.MAX_TURNS, StopReason.FAILED]
    summary = summarise([dialogue(str(i), 1, stop) for i, stop in enumerate(stops)])
    assert summary.stops == {"completed": 0.75, "max_turns": 0.25}


def test_metrics_without_a_reward_are_derived_from_the_turns():
    values = metric_values(dialogue("a", turns=[turn(1.0), turn(0.5, ("solve",))]))
    assert values == {"success": 1.0, "turns": 2.0, "engagement": 0.75}


def test_a_reward_wins_over_the_derived_metric():
    assert metric_values(dialogue("a", success=0.25, turns=[turn(1.0)]))["success"] == 0.25


def test_nan_is_not_measured_rather_than_zero():
    summary = summarise([dialogue("a", 50, chrf=math.nan), dialogue("b", 70, chrf=0.5), dialogue("c", 60)])
    assert summary.metrics["tse"].goals == 3
    assert (summary.metrics["chrf"].mean, summary.metrics["chrf"].goals) == (0.5, 1)


def test_no_dialogues_give_an_empty_summary():
    summary = summarise([])
    assert (summary.metrics, summary.stops, summary.dialogues) == ({}, {}, 0)


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


def test_slices_by_task_and_persona_leave_out_continuous_traits():
    trajectories = [
        dialogue(str(i), 0, intent="return" if i < 15 else "cancel", persona={"tone": "terse", "patience": i / 7})
        for i in range(20)
    ]
    found = {name: len(members) for name, members in slices(trajectories).items()}
    assert found == {"intent: cancel": 5, "intent: return": 15, "persona tone: terse": 20}
