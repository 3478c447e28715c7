"""Rewards against numbers worked out by hand, and the properties that training relies on."""

import doctest
import importlib
import math
import pkgutil
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_gopo import rewards
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.evaluation.scripted import demonstrations
from openrlhf_gopo.rewards import text
from openrlhf_gopo.rewards.joint import METRICS, joint, parse_weights, score
from openrlhf_gopo.rewards.ndcg import esndcg
from openrlhf_gopo.rewards.response import no_repetition, response_scores
from openrlhf_gopo.rewards.text import mentions, values
from openrlhf_gopo.rewards.tse import focused_engagement, progress, tse
from openrlhf_gopo.rewards.turns import turn_rewards
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

GOAL = Goal("g1", "refund", "order desk", {"find": 0.2, "refund": 0.5, "close": 0.3})


def dialogue(*turns: Turn, goal: Goal = GOAL) -> Trajectory:
    return Trajectory(goal, 0, 0, list(turns), StopReason.CLOSED)


def turn(reply="ok then", user="hi", **fields) -> Turn:
    fields = {"allowed": ("a", "b"), "strategy": "a", **fields}
    return Turn(user, reply=reply, **fields)


MODULES = [module.name for module in pkgutil.iter_modules(rewards.__path__)]
WITHOUT_EXAMPLES = {"custom"}  # files, entry points, threads: tests/rewards/test_custom.py


@pytest.mark.parametrize("name", MODULES)
def test_the_worked_examples_of_the_docstrings_hold(name):
    outcome = doctest.testmod(importlib.import_module(f"openrlhf_gopo.rewards.{name}"))
    assert (outcome.attempted > 0) == (name not in WITHOUT_EXAMPLES)
    assert outcome.failed == 0


# TSE


def test_tse_of_a_hand_worked_dialogue():
    found = dialogue(
        turn(completed=("find",), engagement=0.9, on_task=True),
        turn(engagement=0.7),  # off task: does not count
        turn(completed=("refund",), engagement=0.5, on_task=True),
        turn(engagement=0.2, on_task=True),
    )
    assert progress(found) == pytest.approx(0.7)
    assert focused_engagement(found) == pytest.approx((0.9 + 0.5 + 0.2) / 4)
    assert tse(found) == pytest.approx(100 * 0.7 * (0.5 + 0.5 * 0.4))
    assert tse(found, kappa=0.0) == pytest.approx(70.0)
    assert tse(found, kappa=1.0) == pytest.approx(28.0)


def test_a_perfect_dialogue_has_tse_100():
    assert tse(dialogue(turn(completed=tuple(GOAL.subgoals), engagement=1.0, on_task=True))) == pytest.approx(100.0)


def test_a_subgoal_counts_once():
    once = dialogue(turn(completed=("find",)))
    twice = dialogue(turn(completed=("find", "find")))
    assert progress(twice) == progress(once)


def test_a_subgoal_that_the_goal_does_not_have_is_an_error():
    with pytest.raises(DialogueError, match=r"goal g1: completed 'fly'"):
        score(dialogue(turn(completed=("fly",))))


@pytest.mark.parametrize("kappa", [-0.1, 1.5, math.nan])
def test_kappa_outside_the_unit_interval_is_an_error(kappa):
    with pytest.raises(ConfigError, match="kappa="):
        tse(dialogue(turn()), kappa)


# ESNDCG


def test_esndcg_of_a_hand_worked_dialogue():
    found = dialogue(
        turn(relevance={"a": 1, "b": 2}),
        turn(relevance={"a": 3, "b": 0}),
        turn(relevance={"a": 0, "b": 1}),
    )
    # discounts 1/log2(2), 1/log2(3), 1/log2(4) = 1, 0.63093, 0.5
    assert esndcg(found) == pytest.approx((1 + 3 * 0.6309298) / (2 + 3 * 0.6309298 + 0.5), rel=1e-6)


def test_esndcg_where_nothing_is_relevant_or_graded():
    assert esndcg(dialogue(turn(relevance={"a": 0, "b": 0}))) == 0.0
    graded = turn(relevance={"a": 2, "b": 3})
    assert esndcg(dialogue(graded, turn())) == pytest.approx(2 / 3)  # the ungraded turn does not count


# GRE


@pytest.mark.parametrize(
    ("reply", "string", "expected"),
    [
        ("your order a417.", "A417", True),
        ("Order A4178 is here", "A417", False),
        ("costs 35 dollars", "$35", True),
        ("costs $35.00!", "$35", True),
        ("costs $35.50", "$35", False),
        ("costs $350", "$35", False),
        ("sum: $1,200", "$1200", True),
        ("sent to  oak\n12", "Oak 12", True),
        ("it is booked", "book", False),
        ("", "A417", False),
        ("您的订单A417已发货", "A417", True),
        ("您的订单A4178已发货", "A417", False),
        ("您的订单 Ａ４１７，35元", "A417", True),
        ("订单A5的价格是$35", "$35", True),
        ("价格是35美元，订单A5", "$35", True),
        ("价格是$350元", "$35", False),
        ("一共 35 元。", "35元", True),
        ("一共￥1,235.00", "1235元", True),
        ("一共1235元", "235元", False),
        ("一共35块钱", "35元", True),
        ("给您35块布", "35元", False),
        ("一共35.5元", "35元", False),
        ("可以在周一送到", "周一", True),
        ("可以在周一送到", "周二", False),
        ("期限是 30 天", "30天", True),
        ("期限是130天", "30天", False),
        ("A5（红色）35元", "A5", True),
    ],
)
def test_mentions(reply, string, expected):
    assert mentions(reply, string) is expected


def test_a_reply_is_grounded_in_context_briefings_and_what_the_user_said_so_far():
    goal = Goal("g", "", "desk 7", {"x": 1.0})
    found = dialogue(
        turn("desk 7 here, order a417?", user="i have order A417"),
        turn("it costs 35 dollars", briefing="price: $35"),
        turn("see you on the 12", user="when?"),  # nobody said 12
        turn("as i said, the 12", user="ok"),  # its own words are no ground
        goal=goal,
    )
    assert response_scores(found)["grounded"] == pytest.approx(2 / 4)


def test_later_turns_do_not_ground_earlier_replies():
    early = dialogue(turn("it is $35"), turn("fine", briefing="price: $35"))
    assert response_scores(early)["grounded"] == pytest.approx(1 / 2)


def test_repetition_counts_within_a_reply_and_against_earlier_ones():
    assert no_repetition("we will send it today", []) == 1.0
    assert no_repetition("We will send it today!", ["we will send it today"]) == 0.0
    # triples: ba ba ba, ba ba ba: one distinct of two
    assert no_repetition("ba ba ba ba", []) == pytest.approx(0.5)
    # triples: i found your, found your order; the first was said before
    assert no_repetition("i found your order", ["i found your mail", "hello"]) == pytest.approx(0.5)


def test_in_chinese_repetition_counts_characters():
    assert no_repetition("我们今天发货", []) == 1.0
    assert no_repetition("我们今天发货。", ["好的，我们今天发货"]) == 0.0
    # 谢谢您 was said before, 谢您的 and 您的A5 were not
    assert no_repetition("谢谢您的A5", ["谢谢您"]) == pytest.approx(2 / 3)


def test_gre_is_the_mean_of_its_parts_over_the_replies():
    found = dialogue(turn("order A417 is here", expected=("A417",)), turn("one moment please", expected=("A417",)))
    scores = response_scores(found)
    assert scores["realised"] == pytest.approx(0.5)
    assert scores["grounded"] == pytest.approx(0.5)  # A417 was never said to the agent
    assert scores["no_repetition"] == 1.0
    assert scores["gre"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_a_blank_reply_earns_nothing():
    assert response_scores(dialogue(turn("  ")))["gre"] == 0.0


@pytest.mark.parametrize("piece", ["a", "1", "1.", "1..1", "$", ".", "a1", "1,000", "1 "])
def test_reading_values_takes_linear_time(piece):
    """A customer may paste anything: 200,000 letters took minutes when every position of a run was tried."""
    start = time.perf_counter()
    values(piece * (200_000 // len(piece)))
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("written", "read"),
    [("1..5 dollars", "$1..5"), (".5 usd", ".$5"), ("$ 12.50 bucks", "$12.50"), ("a1 usd", "a$1"), ("7.usd", "$7.")],
)
def test_a_price_is_the_whole_run_of_digits_and_points_before_the_word(written, read):
    assert text.normalise(written) == read


def test_values_finds_ids_numbers_and_prices():
    assert values("Order B203 from 10:30, 2 items at $19.99 (20% off), see O'Neil.") == {
        "b203",
        "10:30",
        "2",
        "19.99",
        "20",
    }
    assert values("订单B203的Ａ5在10:30送到，2件共￥19.99元，订单B203") == {"b203", "a5", "10:30", "2", "19.99"}


@given(
    st.text(alphabet="订单价格元块天 "),
    st.from_regex(r"[A-D][1-9]|\$[1-9][0-9]|[1-9][0-9]元", fullmatch=True),
    st.text("的在，。 "),
)
def test_a_value_is_found_inside_chinese_text(before, value, after):
    assert mentions(before + value + after, value)
    assert values(before + value + after) == {value.strip("$元").lower()}


# score and joint


def test_score_reports_every_metric():
    found = dialogue(
        turn("A417 it is", strategy="a", completed=("find", "refund", "close"), engagement=1.0, on_task=True,
             expected=("A417",), briefing="A417", relevance={"a": 3, "b": 0}),
        turn("good bye now", strategy="c"),
    )  # fmt: skip
    scores = score(found)
    assert tuple(scores) == METRICS
    assert scores["tse"] == pytest.approx(75.0)
    assert scores["success"] == 1.0
    assert scores["turns"] == 2.0
    assert scores["sop"] == 0.5  # c was not allowed
    assert scores["esndcg"] == 1.0
    assert scores["gre"] == pytest.approx(1.0)


def test_a_dialogue_without_turns_scores_zero_everywhere():
    assert score(dialogue()) == dict.fromkeys(METRICS, 0.0)
    assert tse(dialogue()) == esndcg(dialogue()) == response_scores(dialogue())["gre"] == 0.0


def test_joint_scales_tse_to_one():
    scores = {"tse": 80.0, "gre": 0.5, "turns": 6.0}
    assert joint(scores, {"tse": 1.0, "gre": 0.5, "turns": -0.01}) == pytest.approx(0.8 + 0.25 - 0.06)
    assert joint(scores, {}) == 0.0


def test_joint_rejects_an_unknown_weight():
    with pytest.raises(ConfigError, match=r"reward weight fun=1.0: no such reward; choose from tse"):
        joint({"tse": 1.0}, {"fun": 1.0})


def test_parse_weights():
    assert parse_weights("tse=1,gre=0.5") == {"tse": 1.0, "gre": 0.5}
    assert parse_weights(" tse = 1 , turns=-1e-2, ") == {"tse": 1.0, "turns": -0.01}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "give at least one"),
        ("fun=1", "unknown reward 'fun'; choose from tse, esndcg"),
        ("tse", "tse needs a finite number"),
        ("tse=high", "tse needs a finite number"),
        ("tse=inf", "tse needs a finite number"),
        ("tse=1,tse=2", "tse is given twice"),
    ],
)
def test_parse_weights_names_what_is_wrong(written, message):
    with pytest.raises(ConfigError, match=message):
        parse_weights(written)


# Properties

unit = st.floats(0.0, 1.0)
words = st.lists(st.sampled_from(("order", "A417", "$35", "is", "here", "12", "")), max_size=6).map(" ".join)


@st.composite
def dialogues(draw):
    turns = []
    open_ = list(GOAL.subgoals)
    for _ in range(draw(st.integers(0, 6))):
        done = tuple(s for s in open_ if draw(st.booleans()))
        open_ = [s for s in open_ if s not in done]
        grades = {s: draw(st.integers(0, 3)) for s in ("a", "b")}
        turns.append(
            turn(draw(words), draw(words), strategy=draw(st.sampled_from("ab")), completed=done, relevance=grades,
                 engagement=draw(unit), on_task=bool(done) or draw(st.booleans()), briefing=draw(words),
                 expected=tuple(draw(st.lists(st.sampled_from(("A417", "$35")), max_size=2))))
        )  # fmt: skip
    return dialogue(*turns)


@given(dialogues(), unit)
def test_every_metric_stays_within_its_bounds(found, kappa):
    scores = score(found, kappa)
    assert 0.0 <= scores["tse"] <= 100.0 + 1e-9
    assert all(0.0 <= scores[name] <= 1.0 for name in METRICS if name not in ("tse", "turns"))
    assert scores["turns"] == len(found.turns)


@given(dialogues(), st.data())
def test_more_engagement_on_task_never_lowers_tse(found, data):
    if not found.turns:
        return
    before = tse(found)
    one = data.draw(st.sampled_from(found.turns))
    one.engagement, one.on_task = data.draw(st.floats(one.engagement, 1.0)), True
    assert tse(found) >= before - 1e-9


@given(dialogues())
def test_completing_what_is_open_never_lowers_tse(found):
    before = tse(found)
    if found.turns:
        found.turns[-1].completed += tuple(s for s in GOAL.subgoals if s not in found.completed)
        assert tse(found) >= before - 1e-9


@given(dialogues(), st.randoms(use_true_random=False))
def test_tse_does_not_depend_on_the_order_of_turns(found, rng):
    before = tse(found)
    rng.shuffle(found.turns)
    assert tse(found) == pytest.approx(before)


@given(dialogues(), st.permutations("abcdefgh"), unit)
def test_no_metric_depends_on_what_ids_are_called(found, names, kappa):
    """Strategies, subgoals and the goal under other names, consistently; the seed and sample too."""
    other = dict(zip((*"ab", *GOAL.subgoals, "g1"), names, strict=False))
    goal = replace(GOAL, id=other["g1"], subgoals={other[s]: weight for s, weight in GOAL.subgoals.items()})
    renamed = [
        replace(
            one,
            strategy=other[one.strategy],
            allowed=tuple(other[s] for s in one.allowed),
            relevance={other[s]: grade for s, grade in one.relevance.items()},
            completed=tuple(other[s] for s in one.completed),
        )
        for one in found.turns
    ]
    again = Trajectory(goal, 7, 99, renamed, StopReason.CLOSED)
    assert score(again, kappa) == score(found, kappa)
    weights = dict.fromkeys(METRICS, 1.0)
    assert turn_rewards(again, weights, kappa) == turn_rewards(found, weights, kappa)


def test_the_best_choices_score_one_exactly():
    """Grades whose shares of the denominator round to more than 1 in all."""
    graded = [turn(strategy="b", relevance={"a": 0, "b": grade}) for grade in (2, 3, 2, 2, 1)]
    possible = sum(one.relevance["b"] / math.log2(t + 2) for t, one in enumerate(graded))
    assert sum(one.relevance["b"] / math.log2(t + 2) / possible for t, one in enumerate(graded)) > 1.0
    assert esndcg(dialogue(*graded)) == 1.0


@given(dialogues())
def test_the_best_choice_at_every_turn_has_the_highest_esndcg(found):
    before = esndcg(found)
    for one in found.turns:
        one.strategy = max(one.relevance, key=lambda s, one=one: one.relevance[s])
    best = esndcg(found)
    assert best >= before
    assert best == 1.0 or all(max(one.relevance.values()) == 0 for one in found.turns)


@given(st.dictionaries(st.sampled_from(METRICS), st.floats(-5, 5), min_size=1))
def test_weights_survive_writing_and_parsing(weights):
    assert parse_weights(",".join(f"{name}={weight!r}" for name, weight in weights.items())) == weights


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("skill", [0.0, 0.7, 1.0])
def test_what_the_turns_earned_is_the_return(metric, skill):
    """On real dialogues, for every metric: nothing of the joint reward is lost or counted twice."""
    env = load_environment("shop", None)
    for trajectory in demonstrations(env, 12, skill, seed=3):
        earned = turn_rewards(trajectory, {metric: 2.0})
        assert len(earned) == len(trajectory.turns)
        assert sum(earned) == pytest.approx(joint(trajectory.rewards, {metric: 2.0}), abs=1e-9)


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "success"])
@given(dialogues(), dialogues(), st.data())
def test_what_a_turn_earned_does_not_depend_on_later_turns(metric, one, other, data):
    """The same first turns, another end. (Success is told by the environment for the whole dialogue alone.)"""
    start = data.draw(st.integers(0, len(one.turns)))
    changed = dialogue(*one.turns[:start], *other.turns)
    weights = {metric: 2.0}
    assert turn_rewards(changed, weights)[:start] == pytest.approx(turn_rewards(one, weights)[:start], abs=1e-12)


def test_going_on_idly_is_not_credited_with_the_rest_of_the_dialogue():
    """Five good turns have earned 90; to stop there, or five idle turns and then the last 10.

    Stopping earns nothing more, going on loses engagement: E = 6/11, 100 (0.5 + 0.5 x 6/11) = 77.3 - 90.
    """
    goal = Goal("g", "refund", "", {"main": 0.9, "last": 0.1})
    good = [turn(engagement=1.0, on_task=True, completed=("main",) if t == 0 else ()) for t in range(5)]
    idle = [turn(engagement=0.3) for _ in range(5)]
    stop = dialogue(*good, turn(engagement=1.0, on_task=True), goal=goal)
    go = dialogue(*good, *idle, turn(engagement=1.0, on_task=True, completed=("last",)), goal=goal)
    assert sum(turn_rewards(stop, {"tse": 1.0})[5:]) == pytest.approx(0.0)
    assert sum(turn_rewards(go, {"tse": 1.0})[5:]) == pytest.approx(0.5 + 0.5 * 6 / 11 - 0.9)


def test_a_dialogue_without_turns_earned_nothing():
    assert turn_rewards(Trajectory(Goal("g", "i", "", {"x": 1.0}), 0, 0), {"tse": 1.0}) == []
