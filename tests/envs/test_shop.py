"""The environment ``shop``: what its agent and its customers see, and how hard it is."""

import asyncio
import dataclasses
import pickle
import random
import re
import statistics
import subprocess
import sys

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.envs.shop import Shop
from openrlhf_gopo.envs.shop_goals import FAMILIES, PERSONAS, UNSEEN_FAMILIES, UNSEEN_PERSONAS
from openrlhf_gopo.envs.shop_tasks import TASKS
from openrlhf_gopo.envs.shop_texts import load_texts
from openrlhf_gopo.errors import ConfigError, DialogueError, SopError
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy
from openrlhf_gopo.rewards import score
from openrlhf_gopo.rollout.dialogue import Limits, run_dialogue
from openrlhf_gopo.types import StopReason, Trajectory, Turn
from openrlhf_gopo.users.agenda import REACTIONS, AgendaUser

ENV = Shop()
GOALS = {split: list(ENV.goals(split)) for split in ("train", "heldout")}
TEXTS = load_texts("en")


def find(task, persona="loyal", **data):
    """A heldout or train goal of the task; loyal customers answer every question."""
    wanted = {"vague": False, "talks": False, "wish": "", "too_old": False, **data}
    for goal in (*GOALS["heldout"], *GOALS["train"]):
        if goal.intent == task and goal.persona["type"] == persona and wanted.items() <= goal.data.items():
            return goal
    raise LookupError(task)


def play(goal, choose, seed=0, reply=None):
    """One dialogue as a Trajectory; ``choose(dialogue, allowed)`` picks, ``reply(dialogue, strategy)`` writes."""
    dialogue = ENV.start(goal, seed)
    trajectory = Trajectory(goal, 0, seed)
    seen = dialogue.opening
    while True:
        relevance = dialogue.relevance()
        strategy = choose(dialogue, seen.allowed)
        said = reply(dialogue, strategy) if reply else dialogue.reference_reply(strategy)
        turn = Turn(seen.user, seen.allowed, strategy, said, dialogue.briefing(strategy), dialogue.expected(strategy))
        turn.relevance = relevance
        outcome = dialogue.step(strategy, said)
        turn.events, turn.completed = outcome.events, outcome.completed
        turn.engagement, turn.on_task = outcome.engagement, outcome.on_task
        trajectory.turns.append(turn)
        if outcome.stop:
            trajectory.stop = outcome.stop
            return trajectory
        seen = outcome.next


def greedy(dialogue, allowed):
    relevance = dialogue.relevance()
    return max(allowed, key=lambda strategy: relevance[strategy])


def script(*strategies):
    left = iter(strategies)
    return lambda dialogue, allowed: next(left)


def mixed(goal, share):
    """The best graded strategy with probability ``share``, else any."""
    rng = random.Random(goal.id)
    return lambda dialogue, allowed: greedy(dialogue, allowed) if rng.random() < share else rng.choice(allowed)


REFUND = ("verify_identity", "ask_order_id", "look_up_order", "explain_policy", "give_refund", "close")

# Data


def test_it_is_found_by_name_and_reads_no_data():
    assert isinstance(load_environment("shop"), Shop)
    with pytest.raises(ConfigError, match=r"--gopo.data my.json: .* leave --gopo.data out"):
        load_environment("shop", "my.json")
    with pytest.raises(ConfigError, match="split 'test': choose one of train, heldout"):
        ENV.goals("test")


def test_it_keeps_the_contract_of_environments():
    check_env(ENV)


def test_there_are_ten_thousand_distinct_goals_in_each_of_which_something_differs():
    goals = [*GOALS["train"], *GOALS["heldout"]]
    assert len(ENV.goals("train")) >= 10_000
    assert len(ENV.goals("heldout")) >= 2_000
    assert len({goal.id for goal in goals}) == len(goals)
    # Not only by name: what customers want and know, without their mood and what only the desk sees.
    assert len({(goal.intent, *goal.facts.values(), *sorted(goal.data.items(), key=str)) for goal in goals}) == len(
        goals
    )
    assert len({(goal.intent, *goal.facts.values()) for goal in goals}) > 5_000
    assert all(3 <= len(goal.subgoals) <= 5 for goal in goals)


def test_the_splits_share_no_pair_and_some_families_and_personas_are_unseen():
    pairs = {s: {(goal.data["family"], goal.persona["type"]) for goal in GOALS[s]} for s in ("train", "heldout")}
    known = {TEXTS.word(family) for family in FAMILIES}
    assert pairs["train"] | pairs["heldout"] == {(family, persona) for family in known for persona in PERSONAS}
    assert not pairs["train"] & pairs["heldout"]
    families, personas = ({pair[i] for pair in pairs["train"]} for i in (0, 1))
    assert known - families == {TEXTS.word(family) for family in UNSEEN_FAMILIES}
    assert set(PERSONAS) - personas == UNSEEN_PERSONAS
    # Every seen persona is held out with a few seen families, too: the pair alone is new.
    for persona in personas:
        assert sum((family, persona) in pairs["heldout"] for family in families) == 4
    for split in pairs:  # the first ones already mix everything
        first = ENV.goals(split)[:100]
        assert {goal.intent for goal in first} == set(TASKS)
        assert len({goal.persona["type"] for goal in first}) == {"train": 8, "heldout": 10}[split]
        assert len({goal.data["family"] for goal in first}) > 18


def test_goals_are_made_when_asked_for_and_always_the_same():
    goals = ENV.goals("train")
    assert goals[3] == list(goals)[3] == goals[:4][-1] == goals[3 - len(goals)]
    assert goals[3] is not goals[3]
    assert len(goals[10:30:2]) == 10
    with pytest.raises(IndexError):
        goals[len(goals)]


def test_what_only_some_goals_have_shows_in_their_subgoals_and_facts():
    for goal in (*GOALS["train"], *GOALS["heldout"]):
        assert (goal.data["age"] > goal.data["limit"]) == goal.data["too_old"]
        assert (
            ("consoled" in goal.subgoals)
            == goal.data["too_old"]
            == (goal.intent == "refund" and "refunded" not in goal.subgoals)
        )
        assert goal.facts.get("wish", "") == goal.data["wish"] != goal.data["free"]
        assert goal.data["stock"] == "here" or goal.data["wish"]
    stocks = [goal.data["stock"] for goal in GOALS["train"] if goal.data["wish"]]
    assert {stocks.count(kind) > len(stocks) // 4 for kind in ("here", "other", "back")} == {True}


def test_goals_are_the_same_in_every_process():
    code = "from openrlhf_gopo.envs.shop import Shop; print([repr(g) for g in Shop().goals('train')[:50]])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([repr(goal) for goal in ENV.goals("train")[:50]])


def test_nothing_told_unasked_is_a_subgoal():
    # It would be completed before the agent's first turn, and no trajectory could ever complete it.
    assert all(not step.weight for task in TASKS.values() for step in task.steps if step.mark in task.told)


def test_the_catalogue_is_described_in_a_few_words():
    catalogue = ENV.catalogue(ENV.goals("train")[0])
    assert len(catalogue) >= 20
    assert all(2 <= len(strategy.description.split()) <= 8 for strategy in catalogue)


def test_texts_are_short_and_of_a_small_vocabulary():
    replies = [reply for entry in TEXTS.scripts.values() for reply in entry.replies]
    assert all(6 <= len(reply.split()) <= 20 for reply in replies)
    assert all(len(entry.replies) >= 2 and "\n" not in entry.briefing for entry in TEXTS.scripts.values())
    assert all(len(phrases) >= 2 for phrases in TEXTS.phrases.values())
    said = " ".join(replies + [phrase for phrases in TEXTS.phrases.values() for phrase in phrases])
    assert len(set(re.findall(r"[a-z']+", re.sub(r"\{\w+\}", "", said.lower())))) < 400


# Difficulty


def test_random_play_is_poor_relevance_is_good_and_a_mixture_lies_between():
    tse = {}
    turns = {}
    for share in (0.0, 0.55, 1.0):
        played = [play(goal, mixed(goal, share)) for goal in GOALS["heldout"][:300]]
        tse[share] = statistics.mean(score(one)["tse"] for one in played)
        turns[share] = statistics.mean(len(one.turns) for one in played)
        allowed = statistics.mean(len(turn.allowed) for one in played for turn in one.turns)
        assert 4 <= allowed <= 10
    assert 10 < tse[0.0] < 35
    assert tse[0.0] + 15 < tse[0.55] < tse[1.0] - 15
    assert 80 < tse[1.0] < 98
    assert 5 <= turns[1.0] <= 8


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_completed_in_time(task):
    played = play(find(task), greedy)
    assert played.stop is StopReason.COMPLETED
    assert played.success
    assert len(played.turns) <= 8


# The turn


def test_reference_replies_are_realised_and_grounded():
    for goal in GOALS["heldout"][:100]:
        scores = score(play(goal, mixed(goal, 0.7)))
        assert scores["realised"] == scores["grounded"] == scores["sop"] == 1.0


def test_the_goal_is_completed_by_the_last_step_and_close():
    played = play(find("refund"), script(*REFUND))
    assert [turn.completed for turn in played.turns] == [
        ("identity",), (), ("order_found",), ("terms_known",), ("refunded",), ("wrapped_up",),
    ]  # fmt: skip
    assert played.turns[-1].events == ("thanks",)
    assert all(turn.on_task for turn in played.turns)
    assert played.stop is StopReason.COMPLETED


def test_closing_early_cuts_the_customer_off():
    played = play(find("refund"), script("verify_identity", "ask_order_id", "look_up_order", "close"))
    assert played.stop is StopReason.CLOSED
    assert played.turns[-1].completed == ()
    assert played.turns[-1].engagement < 0.2


@pytest.mark.parametrize("reply", ["", "Your order is here.", "I found your order B999, it is delivered.", "ok"])
def test_a_reply_without_what_it_should_tell_confuses_and_completes_nothing(reply):
    goal = find("refund")
    dialogue = ENV.start(goal, 0)
    for strategy in REFUND[:2]:
        dialogue.step(strategy, dialogue.reference_reply(strategy))
    good = pickle.loads(pickle.dumps(dialogue))
    outcome = dialogue.step("look_up_order", reply)
    told = good.step("look_up_order", good.reference_reply("look_up_order"))
    assert outcome.events == ("confused",)
    assert outcome.completed == ()
    assert told.completed == ("order_found",)
    assert outcome.engagement < told.engagement - 0.3
    # Telling it properly afterwards completes it.
    again = dialogue.step("look_up_order", dialogue.reference_reply("look_up_order"))
    assert again.completed == ("order_found",)


def test_other_wording_of_the_same_values_is_understood():
    dialogue = ENV.start(find("advice"), 0)
    for strategy in ("ask_use", "ask_budget"):
        dialogue.step(strategy, dialogue.reference_reply(strategy))
    item, price = dialogue.expected("recommend")
    assert price.startswith("$")
    outcome = dialogue.step("recommend", f"how about  {item.lower()}? only {price[1:]}.00 Dollars")
    assert outcome.completed == ("item_found",)


def test_a_question_must_be_about_what_is_asked_for():
    dialogue = ENV.start(find("refund"), 0)
    assert dialogue.step("verify_identity", "What a nice day it is!").events == ("confused",)
    assert dialogue.step("verify_identity", "May I have your name?").completed == ("identity",)


def test_recommending_without_knowing_the_customer_misses():
    goal = find("advice")
    dialogue = ENV.start(goal, 0)
    assert goal.data["item"] not in dialogue.briefing("recommend")
    outcome = dialogue.step("recommend", dialogue.reference_reply("recommend"))
    assert outcome.completed == ()
    assert outcome.events == ("object",)


def test_verifying_early_is_better_than_after_the_refund_was_on_hold():
    goal = find("refund")
    early = play(goal, script(*REFUND))
    late = play(goal, script(*REFUND[1:4], "give_refund", "verify_identity", "give_refund", "close"))
    assert "on hold" in late.turns[3].briefing
    assert early.success
    assert late.success
    assert score(late)["tse"] < score(early)["tse"] - 10
    assert late.turns[4].engagement < early.turns[0].engagement - 0.2  # the same question, asked too late
    assert late.turns[5].engagement < early.turns[4].engagement  # and the same refund, less welcome


def test_a_customer_whose_patience_is_out_leaves():
    goal = find("refund", "angry")
    played = play(goal, lambda dialogue, allowed: min(allowed, key=dialogue.relevance().get))
    assert played.stop is StopReason.USER_LEFT
    assert played.turns[-1].events[-1] == "leave"
    assert len(played.turns) < 8


@pytest.mark.parametrize("max_turns", [None, 5, 20])
def test_a_dialogue_ends_after_twelve_turns_or_as_many_as_the_flag_says(max_turns):
    goal = find("address")
    goal = dataclasses.replace(goal, persona={**goal.persona, "patience": 99.0})
    running = run_dialogue(ENV, goal, ScriptedPolicy(0.0, slip=1.0), Limits(max_turns=max_turns))
    played = asyncio.run(running)
    assert played.stop is StopReason.MAX_TURNS
    assert len(played.turns) == (max_turns or ENV.max_turns)
    assert ENV.max_turns == 12


# Determinism, errors


def test_equal_choices_give_equal_transcripts_and_seeds_change_them():
    goals = GOALS["heldout"][:20]
    once, again, other = ([play(goal, mixed(goal, 0.6), seed) for goal in goals] for seed in (3, 3, 4))
    assert [one.turns for one in once] == [one.turns for one in again]
    assert [one.turns for one in once] != [one.turns for one in other]


def test_a_dialogue_pickles_before_it_starts():
    goal = find("damaged")
    dialogue = ENV.start(goal, 5)
    copy = pickle.loads(pickle.dumps(dialogue))
    assert copy.opening == dialogue.opening
    reply = dialogue.reference_reply("apologise")
    assert copy.step("apologise", reply) == dialogue.step("apologise", reply)


def test_forbidden_and_late_steps_are_errors_that_say_why():
    dialogue = ENV.start(find("refund"), 0)
    with pytest.raises(SopError, match=r"shop, goal shop-refund-\S+: 'look_up_order' is not allowed now: it needs"):
        dialogue.step("look_up_order", "hi")
    with pytest.raises(SopError, match="'ask_use' is not allowed now: it is not a strategy of shop, part 'orders'"):
        dialogue.step("ask_use", "hi")
    for strategy in REFUND:
        dialogue.step(strategy, dialogue.reference_reply(strategy))
    with pytest.raises(DialogueError, match="after the dialogue ended"):
        dialogue.step("clarify", "hi")


# The customer


def test_the_agenda_user_feels_what_happens():
    user = AgendaUser({"type": "x", "patience": 2.0, "trust": 0.5, "price_sensitivity": 0.5}, {"a": ["b"]}, {})
    assert user.feel("idle").engagement == REACTIONS["idle"].engagement  # at trust 0.5, as the table says
    assert user.patience == pytest.approx(1.0)
    assert user.trust < 0.5
    assert user.feel("idle").engagement < REACTIONS["idle"].engagement
    assert user.gone
    assert user.say(random.Random(0), ["a"], {}) == "b"


def test_an_upset_user_loses_patience_faster_until_someone_cares():
    persona = {"type": "x", "patience": 9.0, "trust": 0.5, "price_sensitivity": 0.5}
    user = AgendaUser(persona, {}, {}, upset=True)
    assert user.feel("idle").patience == pytest.approx(-1.5)
    user.feel("care")
    assert user.feel("idle").patience == pytest.approx(-1.0)
