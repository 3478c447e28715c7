"""Rows of policies at several temperatures: their names, their order, and what each is compared with."""

from openrlhf_gopo.evaluation.decoding import named


def rows(*keys):
    return {key: [] for key in keys}


def test_a_row_is_compared_with_the_first_policy_at_its_own_temperature():
    phases, compared = named(
        rows(("before", 1.0), ("before", 0.0), ("after", 1.0), ("after", 0.0), ("random", None), ("odd", 0.7))
    )
    assert list(phases) == [
        *("before, sampled", "after, sampled", "random", "before, greedy", "after, greedy", "odd, sampled at 0.7")
    ]
    assert compared == {
        "after, sampled": "before, sampled",
        "after, greedy": "before, greedy",
        "random": "before, sampled",
    }


def test_a_first_policy_without_a_temperature_is_compared_with_all():
    _, compared = named(rows(("random", None), ("vote", 1.0), ("vote", 0.0), ("script", None)))
    assert compared == dict.fromkeys(("vote, sampled", "vote, greedy", "script"), "random")


def test_what_was_played_before_training_may_be_lost():
    assert named({}) == ({}, {})
    assert named(rows(("after training", 1.0), ("after training", 0.0)))[1] == {}
    assert named(rows(("before", 1.0), ("after", 1.0), ("after", 0.0)))[1] == {"after, sampled": "before, sampled"}
