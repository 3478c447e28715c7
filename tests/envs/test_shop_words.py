"""The words of the environment ``shop``: nobody names what was not told yet, and sentences fit where they are said."""

import re

import pytest

from openrlhf_gopo.envs.shop import Shop
from openrlhf_gopo.envs.shop_texts import LANGUAGES, load_texts


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_desk_names_no_product_before_the_customer_does(language):
    env, seen = Shop(language), set()
    for goal in (goal for goal in env.goals("heldout")[:400] if goal.data["vague"]):
        dialogue = env.start(goal, 0)
        for strategy in dialogue.opening.allowed:
            said = dialogue.reference_reply(strategy) + dialogue.briefing(strategy)
            assert goal.data["family"] not in said
            assert goal.data["item"] not in said
            seen.add(strategy)
    assert {"ask_use", "ask_budget", "clarify", "ask_order_id"} <= seen


@pytest.mark.parametrize(("language", "order"), [("en", "order"), ("zh", "订单")])
def test_an_order_number_told_unasked_says_that_it_is_one(language, order):
    assert all(order in phrase.format(order_id="A5") for phrase in load_texts(language).phrases["tell.order_id"])


@pytest.mark.parametrize(("language", "possible"), [("en", "can you"), ("zh", "能")])
def test_who_waits_for_the_order_to_be_found_does_not_take_the_search_for_done(language, possible):
    """The hint comes before the order number is told, too."""
    assert all(phrase.startswith(possible) for phrase in load_texts(language).phrases["want.order_found"])


def test_one_thing_is_spoken_of_as_one():
    env = Shop()
    plural = re.compile(
        r"\b(?:a|one|new|good|broken|is|which) (?:shoes|boots)\b|\b(?<!of )(?:shoes|boots) (?:is|has|goes)\b"
    )
    goals = [goal for goal in env.goals("train")[:2000] if re.search("-(?:shoes|boots)-", goal.id)]
    assert goals
    for goal in goals:
        assert not plural.search(env.start(goal, 0).opening.user), goal.id
