"""The share of human turns that an SOP allows: on STAR's small folder, and on dialogues that break its rules."""

import math
import os
from pathlib import Path

import pytest

from openrlhf_gopo.envs.base import HumanTurn
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.evaluation.human import sop_share

TESTS = Path(__file__).parents[1]
REAL = Path(os.environ.get("GOPO_STAR_DATA") or TESTS.parents[1] / "shared" / "data" / "star")


@pytest.fixture
def star():
    return Star.load(str(TESTS / "envs" / "star_fixture"))


def with_turns(env, *strategies):
    """The share of one dialogue; a strategy marked + follows before the user spoke."""
    turns = [HumanTurn("" if s.startswith("+") else "words", s.removeprefix("+"), "Well.") for s in strategies]
    env.human = lambda goal: turns
    return sop_share(env, env.goals("train")[:1])


def test_human_dialogues_that_keep_to_the_procedure(star):
    count = sop_share(star, star.goals("train"))
    assert count.share == 1
    assert count.turns == sum(len(star.human(goal)) for goal in star.goals("train"))


def test_what_breaks_a_rule_is_counted_and_not_played(star):
    count = with_turns(star, "query_check", "ask_name", "table_booked", "query_check")
    assert (count.turns, count.allowed) == (4, 2)
    assert dict(count.broken) == {"query_check": 1, "table_booked": 1}


def test_from_an_unknown_turn_on_nothing_is_judged(star):
    count = with_turns(star, "ask_name", "", "query_check")
    assert (count.turns, count.allowed, count.unknown) == (1, 1, 2)


def test_the_same_again_before_the_user_speaks_is_one_turn(star):
    assert with_turns(star, "ask_name", "+ask_name").turns == 1
    assert with_turns(star, "ask_name", "ask_name").broken["ask_name"] == 1


def test_turns_after_the_end_are_late(star):
    count = with_turns(star, "ask_name", "goodbye", "ask_name", "hello")
    assert (count.turns, count.late) == (2, 2)
    assert math.isnan(sop_share(star, []).share)


def test_stars_wizards_keep_to_its_procedure():
    if not REAL.is_dir():
        pytest.skip(f"no STAR data at {REAL}; set GOPO_STAR_DATA to a clone of the STAR repository")
    env = Star.load(str(REAL))
    assert sop_share(env, env.goals("heldout")).share > 0.9
