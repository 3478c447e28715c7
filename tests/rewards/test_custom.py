"""Rewards from files and entry points: what they return, how they are named, and what a bad one does to dialogues."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import threading
import time
from pathlib import Path

import pytest

from openrlhf_gopo.config import RESPONDER, GopoConfig
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.rewards import METRICS, parse_weights, score
from openrlhf_gopo.rewards.custom import Reward, Rewards, RewardSpec, load_rewards
from openrlhf_gopo.rewards.joint import joint
from openrlhf_gopo.rewards.turns import turn_rewards
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

from ..engine import Engine

TURNS = [Turn("hi", ("a",), "a", "please wait"), Turn("ok", ("a",), "a", "done")]
DIALOGUE = Trajectory(Goal("g1", "refund", "", {"x": 1.0}), 0, 0, TURNS, StopReason.CLOSED)
LIMITS = TokenLimits(max_len=4000, max_turns=3, reply_max_tokens=16, user_timeout=10.0)
TONE = """
def polite(trajectory):
    return sum("please" in turn.reply for turn in trajectory.turns) / len(trajectory.turns)

class Words:
    metrics = ("words/mean", "words/most")

    def __init__(self):
        self.built = True

    def __call__(self, trajectory):
        counts = [len(turn.reply.split()) for turn in trajectory.turns]
        return {"words/most": max(counts), "words/mean": sum(counts) / len(counts)}

def tse(trajectory):
    return 1.0

fixed = 0.5
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "tone.py").write_text(TONE)
    return f"{tmp_path}/tone.py"


# ------------------------------------------------------------------------------------------------------------ by name


def test_a_function_and_a_class_from_a_file(file):
    rewards = load_rewards(RewardSpec(f"{file}:polite, {file}:Words"))
    assert rewards.metrics == (*METRICS, "polite", "words/mean", "words/most")
    found = rewards.score(DIALOGUE)
    assert found == {**score(DIALOGUE), "polite": 0.5, "words/mean": 1.5, "words/most": 2.0}
    assert tuple(found) == rewards.metrics
    assert all(type(value) is float for value in found.values())
    assert asyncio.run(rewards.score_further(DIALOGUE)) == {"polite": 0.5, "words/mean": 1.5, "words/most": 2.0}


def test_an_entry_point_of_another_package(tmp_path, monkeypatch):
    """A real distribution's metadata on the path, as an installed package has it."""
    (tmp_path / "shop_rewards.py").write_text("def brief(trajectory):\n    return 1 / len(trajectory.turns)\n")
    info = tmp_path / "shop_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[openrlhf_gopo.rewards]\nshort = shop_rewards:brief\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = load_rewards(RewardSpec("short"))
    assert rewards.score(DIALOGUE)["short"] == 0.5
    sys.modules.pop("shop_rewards")
    with pytest.raises(
        ConfigError, match=r"--gopo.reward long: no such reward; choose one of judge:.*, short, or path"
    ):
        load_rewards(RewardSpec("long"))


def test_nothing_given_is_the_built_in_metrics():
    rewards = load_rewards(RewardSpec.of(GopoConfig(env="shop")))
    assert rewards.metrics == METRICS
    assert rewards.score(DIALOGUE) == score(DIALOGUE)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("{file}:tse", "tse is a built-in metric; give this one another name"),
        ("{file}:fixed", "0.5 cannot be called; a reward is a function, or a class with one"),
        ("{file}:rude", r"tone\.py defines no rude"),
        ("{file}:polite,{file}:polite", "given twice; leave one out"),
        ("remote:ftp://host", "remote:ftp://host: not a URL"),
        ("remote:http://me:secret@host/rm", "remote:URL: the URL holds a user or password"),
    ],
)
def test_names_that_cannot_be_rewards(file, names, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_rewards(RewardSpec(names.format(file=file)))
    assert str(caught.value).startswith("--gopo.reward ")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("metrics", [(), "polite", ("a=1",), ("a,b",), ("",), (3,), 5])
def test_declared_metrics_must_be_names(metrics):
    def odd(trajectory):
        return {}

    odd.metrics = metrics
    with pytest.raises(ConfigError, match=r"--gopo.reward odd: metrics = .*: give a tuple of names"):
        Reward("odd", "odd", odd)


def test_two_rewards_with_one_metric():
    one, other = (Reward(f"{name}.py:polite", "polite", lambda trajectory: 1.0) for name in "ab")
    with pytest.raises(ConfigError, match=r"b\.py:polite: an earlier reward measures polite too"):
        Rewards([one, other])


def test_weights_know_the_further_metrics(file):
    metrics = load_rewards(RewardSpec(f"{file}:polite")).metrics
    assert parse_weights("tse=1,polite=-0.5", metrics) == {"tse": 1.0, "polite": -0.5}
    with pytest.raises(ConfigError, match=r"unknown reward 'polit'; choose from tse, .*, sop, polite$"):
        parse_weights("polit=1", metrics)


# --------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "odd is nan; a reward is a finite float"),
        (math.inf, "odd is inf; a reward is a finite float"),
        (None, "odd is None; a reward is a finite float"),
        ("0.5", "odd is '0.5'; a reward is a finite float"),
        (True, "odd is True; a reward is a finite float"),
        ([0.5], r"odd is \[0\.5\]; a reward"),
    ],
)
def test_what_is_no_number_is_refused_by_name(value, message):
    rewards = Rewards([Reward("odd.py:odd", "odd", lambda trajectory: value)])
    with pytest.raises(DialogueError, match=rf"^--gopo\.reward odd\.py:odd: {message}"):
        rewards.score(DIALOGUE)


@pytest.mark.parametrize("value", [0.5, {"a": 1.0}, {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": math.nan}])
def test_several_metrics_are_those_declared(value):
    def both(trajectory):
        return value

    both.metrics = ("a", "b")
    with pytest.raises(DialogueError, match=r"^--gopo\.reward both: (returned .* its metrics are a, b|b is nan)"):
        Rewards([Reward("both", "both", both)]).score(DIALOGUE)


def test_what_a_reward_raises_names_it():
    def broken(trajectory):
        return trajectory.turns[7]

    with pytest.raises(DialogueError, match=r"^--gopo\.reward my\.py:broken: IndexError: list index out of range"):
        Rewards([Reward("my.py:broken", "broken", broken)]).score(DIALOGUE)


def test_a_reward_cannot_end_the_process():
    with pytest.raises(DialogueError, match=r"^--gopo\.reward quits: SystemExit: 3"):
        asyncio.run(Rewards([Reward("quits", "quits", lambda trajectory: sys.exit(3))]).score_further(DIALOGUE))


@pytest.mark.parametrize("awaited", [False, True])
def test_one_that_hangs_is_left_behind(awaited):
    free = threading.Event()
    rewards = Rewards([Reward("slow", "slow", lambda trajectory: free.wait(30))], timeout=0.2)
    started = time.monotonic()
    with pytest.raises(DialogueError, match=r"--gopo\.reward slow: no answer in --gopo\.reward_timeout 0\.2 s"):
        asyncio.run(rewards.score_further(DIALOGUE)) if awaited else rewards.score(DIALOGUE)
    assert time.monotonic() - started < 10.0
    free.set()


def test_rewards_run_side_by_side():
    barrier = threading.Barrier(3)  # passed only if all three are in at once

    def meet(trajectory):
        barrier.wait(10)
        return 1.0

    rewards = Rewards([Reward(f"r{i}", f"r{i}", meet) for i in range(3)])
    assert list(asyncio.run(rewards.score_further(DIALOGUE)).values()) == [1.0, 1.0, 1.0]


def test_without_turns_every_metric_is_zero_and_nobody_is_asked():
    asked = []
    rewards = Rewards([Reward("r", "r", asked.append)])
    empty = Trajectory(DIALOGUE.goal, 0, 0, [], StopReason.MAX_TOKENS)
    assert rewards.score(empty) == dict.fromkeys((*METRICS, "r"), 0.0)
    assert asyncio.run(rewards.score_further(empty)) == {"r": 0.0}
    assert asked == []


# ------------------------------------------------------------------------------------------------------- the sums


def test_it_enters_the_joint_reward_and_turn_by_turn_the_last_turn():
    trajectory = Trajectory(DIALOGUE.goal, 0, 0, TURNS, StopReason.CLOSED)
    trajectory.rewards = {**score(trajectory), "polite": 0.5}
    weights = {"turns": 0.1, "polite": 2.0}
    assert joint(trajectory.rewards, weights) == pytest.approx(1.2)
    assert turn_rewards(trajectory, weights) == pytest.approx([0.1, 1.1])


def test_it_enters_the_summary():
    trajectory = Trajectory(DIALOGUE.goal, 0, 0, TURNS, StopReason.CLOSED)
    trajectory.rewards = Rewards([Reward("r", "r", lambda trajectory: 3.0)]).score(trajectory)
    assert summarise([trajectory]).metrics["r"].mean == 3.0


# ------------------------------------------------------------------------------------------------------- dialogues


def rollout(policy, rewards, seeds):
    env = load_environment("shop")
    goal = env.goals("train")[0]

    async def all_of_them():
        generate = Engine(policy).generators()
        played = (
            run_dialogue(env, goal, SampledPolicy(policy, generate, LIMITS), LIMITS, seed=s, sample=s, rewards=rewards)
            for s in seeds
        )
        return await asyncio.gather(*played)

    return asyncio.run(all_of_them())


def test_a_dialogue_carries_its_metrics(policy):
    threads = set()

    def words(trajectory):
        threads.add(threading.current_thread())
        return float(len(trajectory.turns[0].reply.split()))

    (trajectory,) = rollout(policy, Rewards([Reward("words", "words", words)]), [0])
    assert trajectory.error is None
    assert trajectory.rewards == {**score(trajectory), "words": 3.0}
    assert threading.main_thread() not in threads
    assert trajectory.streams[RESPONDER].tokens


def test_a_bad_reward_fails_its_dialogues_and_no_other(policy, caplog):
    """Samples 0 to 3: fine, raises, is NaN, hangs. Nothing becomes a zero, and nobody waits for the one that hangs."""
    free = threading.Event()

    def moody(trajectory):
        if trajectory.sample == 1:
            raise RuntimeError("server on fire")
        if trajectory.sample == 3:
            free.wait(60)
        return math.nan if trajectory.sample == 2 else 0.25

    started = time.monotonic()
    fine, raised, nan, hung = rollout(policy, Rewards([Reward("m.py:moody", "moody", moody)], timeout=3.0), range(4))
    free.set()
    assert time.monotonic() - started < 40
    assert fine.rewards["moody"] == 0.25
    for failed, why in ((raised, "RuntimeError: server on fire"), (nan, "moody is nan"), (hung, "no answer in --gopo")):
        assert failed.stop is StopReason.FAILED
        assert failed.rewards == {}
        assert f"shop, goal {failed.goal.id}: --gopo.reward m.py:moody: {why}" in failed.error
    del failed, raised, nan, hung
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_slow_reward_does_not_stall_the_event_loop(policy):
    """All dialogues wait for their rewards at once, while the loop goes on ticking."""
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def score_and_tick():
        ticking = asyncio.create_task(tick())
        rewards = Rewards([Reward("nap", "nap", lambda trajectory: time.sleep(1.0) or 1.0)])
        started = time.monotonic()
        await asyncio.gather(*(rewards.score_further(DIALOGUE) for _ in range(20)))
        ticking.cancel()
        return time.monotonic() - started

    assert asyncio.run(score_and_tick()) < 10.0  # one after the other: 20
    assert ticks > 10


def test_a_scripted_dialogue_takes_them_too(file):
    env = load_environment("shop")
    played = play(env, env.goals("train")[0], 0, 0, ScriptedPolicy(), load_rewards(RewardSpec(f"{file}:polite")))
    assert 0.0 <= played.rewards["polite"] <= 1.0
    broken = Rewards([Reward("b", "b", lambda trajectory: None)])
    failed = play(env, env.goals("train")[0], 0, 0, ScriptedPolicy(), broken)
    assert (failed.stop, failed.rewards) == (StopReason.FAILED, {})
    assert "--gopo.reward b: b is None" in failed.error
