import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_gopo.evaluation import summary as summary_module
from openrlhf_gopo.evaluation.summary import bootstrap, metric_values, pass_power, slices, summarise
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


def test_resamples_are_the_same_in_blocks(monkeypatch):
    values = [float(i % 7) for i in range(50)]
    whole = bootstrap(values)
    monkeypatch.setattr(summary_module, "BLOCK", 333)  # six resamples at a time, and a rest
    assert bootstrap(values) == whole


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


def test_slices_by_task_and_persona_leave_out_continuous_traits():
    trajectories = [
        dialogue(
            str(i),
            0,
            intent="return" if i < 15 else "cancel",
            persona={"tone": "terse", "order": i, "trust": i % 3 / 2, "patience": i % 2},
        )
        for i in range(20)
    ]
    found = {name: len(members) for name, members in slices(trajectories).items()}
    assert found == {
        "intent: cancel": 5,
        "intent: return": 15,
        "persona patience: 0": 10,
        "persona patience: 1": 10,
    } | {"persona tone: terse": 20}


def test_slices_by_length_go_by_the_turns_taken_in_doubling_steps():
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 17]
    played = [dialogue("g", 0, turns=[turn(0.5)] * n) for n in lengths]
    failed = dialogue("g", 0, StopReason.FAILED, turns=[turn(0.5)] * 3)
    found = {name: len(members) for name, members in slices([*played, failed]).items() if name.startswith("length")}
    assert list(found.items()) == [
        ("length: 1 turn", 1),
        ("length: 2 turns", 1),
        ("length: 3-4 turns", 2),
        ("length: 5-8 turns", 2),
        ("length: 9-16 turns", 2),
        ("length: 17-32 turns", 1),
    ]


@pytest.mark.parametrize(
    ("successes", "samples", "k", "expected"),
    [
        (2, 4, 1, 1 / 2),
        (2, 4, 2, 1 / 6),
        (2, 4, 3, 0),
        (3, 4, 2, 3 / 6),
        (4, 4, 4, 1),
        (0, 1, 1, 0),
        (6, 8, 4, 15 / 70),
    ],
)
def test_pass_k_by_hand(successes, samples, k, expected):
    assert pass_power(successes, samples, k) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_k_is_the_share_of_subsets_that_all_succeed(outcomes, data):
    k = data.draw(st.integers(1, len(outcomes)))
    subsets = list(itertools.combinations(outcomes, k))
    expected = sum(all(subset) for subset in subsets) / len(subsets)
    assert pass_power(sum(outcomes), len(outcomes), k) == pytest.approx(expected)


def test_pass_k_is_unbiased():
    # Success with p = 0.3, five samples: the mean estimate of pass^3 over all outcomes must be 0.3^3.
    mean = sum(math.comb(5, c) * 0.3**c * 0.7 ** (5 - c) * pass_power(c, 5, 3) for c in range(6))
    assert mean == pytest.approx(0.3**3)


@pytest.mark.parametrize(("successes", "samples", "k"), [(1, 2, 3), (1, 2, 0), (3, 2, 1), (-1, 2, 1)])
def test_pass_k_refuses_what_has_no_estimate(successes, samples, k):
    with pytest.raises(ValueError, match=rf"pass\^{k} of {successes} successes in {samples} samples"):
        pass_power(successes, samples, k)


def test_a_summary_has_pass_k_over_the_goals_with_enough_samples():
    solved, not_solved = [turn(1.0, ("solve",))], [turn(1.0)]
    outcomes = {"a": (True, True, True, False), "b": (True, True), "c": (True,)}
    played = [dialogue(g, 0, turns=solved if won else not_solved) for g, all_ in outcomes.items() for won in all_]
    summary = summarise([*played, dialogue("c", 0, StopReason.FAILED)])
    # pass^2: a has 3 of 6 pairs, b its only one; c has a single sample. pass^4: a only.
    assert summary.by_goal["pass_2"] == {"a": 0.5, "b": 1.0}
    assert summary.metrics["pass_2"].mean == 0.75
    assert summary.metrics["pass_4"].mean == 0.0
    assert "pass_8" not in summary.metrics
    assert summary.metrics["success"].mean == pytest.approx((0.75 + 1 + 1) / 3)
