"""Which reply is compared with what a human said: on a small dialogue, and on the environments with human ones."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.base import SPLITS, HumanTurn
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.evaluation.references import add_reference_scores, reference_pairs
from openrlhf_gopo.evaluation.report import table_text
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.rewards.reference import reference_scores
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

FIXTURES = Path(__file__).parents[1] / "envs"


def trajectory(*turns: tuple[str, str]) -> Trajectory:
    played = [Turn("hi", (strategy,), strategy, reply) for strategy, reply in turns]
    return Trajectory(Goal("g", "", "", {"x": 1.0}), 0, 0, played, StopReason.CLOSED)


def test_the_nth_use_of_a_strategy_goes_with_the_humans_nth():
    human = [
        HumanTurn("hello", "greet", "Welcome."),
        HumanTurn("a refund", "ask", "Which order?"),
        HumanTurn("", "ask", "And your name?"),  # the same strategy before the user spoke: one reply
        HumanTurn("A5", "query", ""),
        HumanTurn("", "", "Hm."),
        HumanTurn("Leo", "ask", "Paid by card?"),
    ]
    ours = trajectory(("ask", "one"), ("ask", "two"), ("ask", "three"), ("greet", "four"), ("query", "five"))
    assert reference_pairs(ours, human) == [
        ("one", "Which order? And your name?"),
        ("two", "Paid by card?"),
        ("four", "Welcome."),
    ]


def said(human):
    return [turn for turn in human if turn.strategy and turn.reply]


@pytest.mark.parametrize("name", ["star", "abcd", "multiwoz"])
def test_environments_on_human_data_have_references(name, tmp_path):
    """The human's own replies score 100, a scripted policy's less, and records on disk the same as fresh ones."""
    env = load_environment(name, str(FIXTURES / f"{name}_fixture"))
    goals = [goal for split in SPLITS for goal in env.goals(split) if said(env.human(goal))]
    goal = next(goal for goal in goals if all(a != b for a, b in pairwise(t.strategy for t in said(env.human(goal)))))
    same = Trajectory(goal, 0, 0, [], StopReason.CLOSED)
    same.turns = [Turn(t.user, (t.strategy,), t.strategy, t.reply) for t in said(env.human(goal))]
    add_reference_scores(env, [same])
    assert same.rewards == {"referenced": 1.0, "bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    scripted = play(env, goal, 0, 0, ScriptedPolicy(slip=0.0))
    pairs = reference_pairs(scripted, env.human(goal))
    before = dict(scripted.rewards)
    append_trajectory(tmp_path / "played.jsonl", scripted)
    (read,) = read_trajectories(tmp_path / "played.jsonl")
    add_reference_scores(env, [scripted, read])
    share = len(pairs) / len(scripted.turns)
    assert scripted.rewards == before | {"referenced": share} | reference_scores(pairs)
    assert read.rewards == pytest.approx(scripted.rewards)
    assert 0 < share <= 1
    shown = table_text({name: summarise([scripted])})
    assert "| BLEU | chrF | replies with a reference |" in shown


def test_where_no_human_was_nothing_is_added():
    shop = load_environment("shop")
    played = play(shop, shop.goals("train")[0], 0, 0, ScriptedPolicy())
    star = load_environment("star", str(FIXTURES / "star_fixture"))
    failed = Trajectory(star.goals("train")[0], 0, 0, [Turn("hi", (), "", "x")], StopReason.FAILED)
    before = dict(played.rewards)
    add_reference_scores(shop, [played])
    add_reference_scores(star, [failed, played])
    assert (played.rewards, failed.rewards) == (before, {})
