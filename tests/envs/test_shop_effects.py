"""The delayed effects of the environment ``shop``, each shown by dialogues played by hand."""

import statistics

import pytest

from openrlhf_gopo.envs.shop import Shop
from openrlhf_gopo.types import StopReason

ENV = Shop()
GOALS = [*ENV.goals("heldout"), *ENV.goals("train")]


def some(task, **data):
    """The goals of a task whose customers say at once what they want, and nothing else; wishes only when asked for."""
    wanted = {"vague": False, "talks": False, "wish": "", "too_old": False, **data}
    wished = wanted.pop("wish")
    return [
        goal
        for goal in GOALS
        if goal.intent == task and bool(goal.data["wish"]) == bool(wished) and wanted.items() <= goal.data.items()
    ]


def find(task, persona="loyal", **data):
    """The first of them with this persona; loyal customers answer every question."""
    return next(goal for goal in some(task, **data) if goal.persona["type"] == persona)


def run(goal, *strategies, seed=0):
    """The outcomes of these strategies with their reference replies, as far as the dialogue goes; and the dialogue."""
    dialogue = ENV.start(goal, seed)
    outcomes = []
    for strategy in strategies:
        outcomes.append(dialogue.step(strategy, dialogue.reference_reply(strategy)))
        if outcomes[-1].stop:
            break
    return outcomes, dialogue


# Stock

ADVICE = ("ask_use", "ask_budget", "recommend")


@pytest.mark.parametrize("stock", ["other", "back"])
def test_what_is_sold_out_can_not_be_bought_before_the_stock_is_checked(stock):
    goal = find("advice", wish=True, stock=stock)
    (*_, blind), dialogue = run(goal, *ADVICE, "invite_to_buy")
    assert goal.data["wish"] in dialogue.opening.user
    assert blind.events == ("object",)
    assert "sold out" in blind.next.user
    assert blind.completed == ()
    (*_, checked, _, bought), _ = run(goal, *ADVICE, "check_stock", "offer_coupon", "invite_to_buy")
    assert checked.on_task
    assert checked.completed == ()  # it earns nothing itself, it pays off at the purchase
    assert bought.completed == ("bought",)
    (*_, after, _, late), _ = run(goal, *ADVICE, "invite_to_buy", "check_stock", "offer_coupon", "invite_to_buy")
    assert late.completed == ("bought",)  # sold in the end, but with trust lost
    assert after.engagement < checked.engagement


def test_a_wish_that_is_in_stock_can_be_bought_unchecked_and_grades_do_not_tell():
    for stock in ("here", "other", "back"):
        _, dialogue = run(find("advice", wish=True, stock=stock), *ADVICE)
        grades = dialogue.relevance()
        assert (grades["invite_to_buy"], grades["check_stock"]) == (1, 2)
    (*_, bought), _ = run(find("advice", wish=True, stock="here"), *ADVICE, "offer_coupon", "invite_to_buy")
    assert bought.completed == ("bought",)
    _, dialogue = run(find("advice"), *ADVICE)  # no wish, nothing to check
    assert (dialogue.relevance()["invite_to_buy"], dialogue.relevance()["check_stock"]) == (3, 0)


def test_with_another_colour_in_stock_the_desk_may_promise_that_one_only():
    goal = find("warranty", wish=True, stock="other")
    data = goal.data
    (*_, checked), dialogue = run(goal, "explain_warranty", "check_stock")
    assert checked.completed == ("stock_known",)
    assert "pity" in checked.next.user
    assert dialogue.expected("invite_to_buy") == (data["item"], data["free"], f"${data['price']}")
    promised = dialogue.step("invite_to_buy", f"Do you want the {data['item']} in {data['wish']} for ${data['price']}?")
    assert promised.events == ("confused",)
    _, dialogue = run(goal, "explain_warranty")
    told = dialogue.step("check_stock", f"The {data['item']} in {data['wish']} can arrive on {data['day']}.")
    assert told.completed == ()


def test_who_must_wait_for_a_back_order_finds_it_dear_more_often():
    def objections(**data):
        goals = [g for g in some("warranty", **data) if g.persona["type"] in ("calm", "loyal", "chatty")]
        ends = [run(goal, "explain_warranty", "check_stock", "invite_to_buy")[0][-1] for goal in goals]
        return statistics.mean("object" in end.events for end in ends)

    assert objections(wish=True, stock="back") > objections(wish=True, stock="here") + 0.15
    goal = find("warranty", wish=True, stock="back")
    _, dialogue = run(goal, "explain_warranty")
    assert dialogue.expected("check_stock") == (goal.data["item"], f"{goal.data['weeks']} weeks")


# Returns policy

FOUND = ("verify_identity", "ask_order_id", "look_up_order")


@pytest.mark.parametrize("steps", [(*FOUND, "explain_policy"), ("explain_policy", *FOUND)])
def test_who_is_too_late_to_return_knows_once_order_and_terms_are_told(steps):
    (*before, known), _ = run(find("refund", too_old=True), *steps)
    in_time, _ = run(find("refund"), *steps)
    assert any(phrase in known.next.user for phrase in ("too late", "what can i do then"))
    assert not any("too late" in outcome.next.user for outcome in (*before, *in_time))
    assert known.completed == in_time[-1].completed != ()
    assert known.engagement < in_time[-1].engagement - 0.2


def test_too_late_there_is_no_refund_but_a_coupon():
    goal = find("refund", too_old=True)
    (*_, refused), dialogue = run(goal, *FOUND, "explain_policy", "give_refund")
    assert refused.events == ("object",)
    assert refused.completed == ()
    assert f"{goal.data['limit']} days" in dialogue.reference_reply("give_refund")
    (*_, late, _), _ = run(goal, *FOUND, "explain_policy", "give_refund", "offer_coupon", "close")
    (*_, consoled, closed), _ = run(goal, *FOUND, "explain_policy", "offer_coupon", "close")
    assert late.completed == consoled.completed == ("consoled",)
    assert late.engagement < consoled.engagement
    assert closed.stop is StopReason.COMPLETED


def test_a_coupon_is_no_consolation_before_the_customer_knows_and_none_for_a_refund():
    goal = find("refund", too_old=True)
    early, dialogue = run(goal, *FOUND, "offer_coupon")
    assert early[-1].completed == ()
    assert early[-1].events == ("object",)
    in_time, dialogue = run(find("refund"), *FOUND, "explain_policy", "offer_coupon")
    assert in_time[-1].completed == ()
    assert dialogue.relevance()["give_refund"] == 3


def test_the_order_says_how_old_it_is():
    for too_old in (False, True):
        goal = find("refund", too_old=too_old)
        _, dialogue = run(goal, *FOUND[:2])
        assert dialogue.expected("look_up_order") == (goal.data["order_id"], f"{goal.data['age']} days")


# Coupons, apologies, trust


def test_a_coupon_that_comes_too_early_costs_sales():
    def bought(*strategies):
        return statistics.mean("bought" in run(goal, *strategies)[0][-1].completed for goal in some("warranty"))

    patient = ("check_stock", "explain_warranty", "offer_coupon", "invite_to_buy")
    pushy = ("check_stock", "offer_coupon", "explain_warranty", "invite_to_buy")
    assert bought(*patient) > bought(*pushy) + 0.2


def test_after_a_coupon_that_came_too_early_prices_look_higher():
    def objections(*strategies):  # loyal customers trust enough to buy even so
        loyal = [goal for goal in some("warranty") if goal.persona["type"] == "loyal"]
        return statistics.mean("object" in run(goal, *strategies)[0][-1].events for goal in loyal)

    steps = ("check_stock", "explain_warranty", "invite_to_buy")
    assert objections(steps[0], "offer_coupon", *steps[1:]) > objections(*steps) + 0.1


def test_an_accepted_coupon_lowers_the_price():
    goal = find("warranty")
    _, dialogue = run(goal, "check_stock", "explain_warranty", "offer_coupon")
    assert dialogue.expected("invite_to_buy") == (goal.data["item"], f"${goal.data['price'] - goal.data['off']}")


def test_an_apology_spares_the_patience_of_an_upset_customer():
    useless = ("ask_photo", "ask_address", "explain_policy", "explain_policy", "ask_address")
    goal = find("late", "calm")
    left, _ = run(goal, *useless)
    spared, _ = run(goal, "apologise", *useless)
    assert left[-1].stop is StopReason.USER_LEFT
    assert len(spared) - 1 > len(left)


def test_a_customer_without_trust_keeps_the_name_back_more_often():
    def refused(persona):
        goals = [goal for goal in some("refund") if goal.persona["type"] == persona]
        return statistics.mean("refuse" in run(goal, "verify_identity", seed=1)[0][0].events for goal in goals)

    assert refused("loyal") < 0.1
    assert refused("doubtful") > 0.4


def test_reactions_are_logged_as_events():
    bought, _ = run(find("advice"), *ADVICE, "offer_coupon", "invite_to_buy", "close")
    assert [outcome.events[0] for outcome in bought[:3]] == ["reply", "reply", "click"]
    assert bought[-2].events == ("purchase",)
    assert bought[-1].events == ("thanks",)
    thrifty = find("warranty", "thrifty")
    welcome, _ = run(thrifty, "explain_warranty", "check_stock", "offer_coupon")
    assert welcome[-1].events == ("cart",)
    left, _ = run(find("late", "angry"), "ask_photo", "ask_address", "explain_policy", "explain_policy")
    assert left[-1].events == ("reply", "leave")
