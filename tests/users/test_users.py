"""User simulators by name and in mixtures: what --gopo.user takes, refuses and records."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter

import pytest

from openrlhf_gopo.config import GopoConfig, LlmConfig
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.evaluation.summary import slices
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits
from openrlhf_gopo.types import Goal, StopReason
from openrlhf_gopo.users import UserSpec, parse_mixture
from openrlhf_gopo.users.base import MAX_UTTERANCE, AsDrafted, Cue, Share, Users, UserSimulator, Voice

from ..conftest import ROOT
from ..engine import Engine

STAR = str(ROOT / "tests" / "envs" / "star_fixture")
LIMITS = TokenLimits(max_len=4000, max_turns=6, reply_max_tokens=16, user_timeout=10.0)
SHOUTS = """
from openrlhf_gopo.users import UserSimulator

class Shouts(UserSimulator):
    blocking = False

    def say(self, cue):
        return cue.draft.upper()

class Fails(UserSimulator):
    def say(self, cue):
        raise OSError("no more words")

class Other:
    pass
"""


@pytest.fixture
def plugin(tmp_path) -> str:
    path = tmp_path / "shouts.py"
    path.write_text(SHOUTS)
    return str(path)


def shop(user: str, **llm: object):
    return load_environment("shop", None, UserSpec(user, LlmConfig(**llm)))


def words(env, goal, seed=0) -> list[str]:
    trajectory = play(env, goal, 0, seed, ScriptedPolicy(0.6))
    assert trajectory.error is None
    return [turn.user for turn in trajectory.turns]


# ------------------------------------------------------------------------------------------------------- the name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("agenda", {"agenda": 1.0}),
        (" agenda = 0.7 ,llm:m@http://h:8/v1=0.3,", {"agenda": 0.7, "llm:m@http://h:8/v1": 0.3}),
        ("a=b.py:C=2,x=1", {"a=b.py:C": 2.0, "x": 1.0}),
        ("a=b.py:C", {"a=b.py:C": 1.0}),
    ],
)
def test_a_mixture_is_read(text, expected):
    assert parse_mixture(text) == expected


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("", "'': name a simulator"),
        (" , ", "name a simulator"),
        ("agenda=0", "agenda=0: the weight must be a positive number"),
        ("agenda=-1", "positive number"),
        ("agenda=nan", "positive number"),
        ("agenda=inf", "positive number"),
        ("agenda=0.7,agenda=0.3", "agenda: named twice"),
        ("agenda,llm:m@http://h/v1=0.3", "agenda: in a mixture every simulator has a weight"),
        (
            "agenda=lots",
            r"agenda=lots: no such user simulator; choose one of agenda, llm:MODEL@URL, or path/to/file\.py",
        ),
        ("nosuch", "nosuch: no such user simulator; choose one of agenda, llm:MODEL@URL, or path"),
        ("replay", r"replay: the own simulator of shop is agenda; give agenda or llm:MODEL@URL"),
        ("llm:", r"llm:: write llm:MODEL@URL, as in llm:Qwen"),
        ("llm:m", "llm:m: write llm:MODEL@URL"),
        ("llm:m@host:80/v1", "llm:m: write llm:MODEL@URL"),
        ("llm:@http://host/v1", "llm:: write llm:MODEL@URL"),
        ("nowhere.py:User", r"nowhere\.py:User: no such file: nowhere\.py"),
    ],
)
def test_what_cannot_be_is_an_error_of_the_flag(user, message):
    with pytest.raises(ConfigError, match=f"^--gopo.user .*{message}"):
        shop(user)


def test_a_password_in_a_mistyped_url_is_not_shown():
    for user in ("llm:m@ftp:/me:secret@host", "llm:m@http://me:secret@host/v1", "agenda=1,llm:m@http://me:secret@h"):
        with pytest.raises(ConfigError) as caught:
            shop(user)
        assert "secret" not in str(caught.value)


def test_a_class_in_a_file(plugin):
    env = shop(f"{plugin}:Shouts")
    goal = env.goals("train")[0]
    assert words(env, goal) == [said.upper() for said in words(load_environment("shop"), goal)]
    assert not env.blocking
    for name, message in (("Other", "is not a subclass of openrlhf_gopo.users.UserSimulator"), ("No", "defines no No")):
        with pytest.raises(ConfigError, match=message):
            shop(f"{plugin}:{name}")


def test_a_class_of_another_package(tmp_path, monkeypatch):
    (tmp_path / "loudly.py").write_text(SHOUTS)
    info = tmp_path / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[openrlhf_gopo.users]\nloud = loudly:Shouts\n")
    monkeypatch.syspath_prepend(tmp_path)
    env = shop("loud")
    assert words(env, env.goals("train")[0])[0].isupper()
    with pytest.raises(ConfigError, match="choose one of agenda, llm:MODEL@URL, loud, or path"):
        shop("quiet")


def test_an_environment_without_a_voice_refuses():
    coffee = f"{ROOT / 'examples' / 'custom_env' / 'coffee.py'}:Coffee"
    assert load_environment(coffee).users is None
    with pytest.raises(ConfigError, match=r"--gopo\.user agenda: the environment coffee words its customers itself"):
        load_environment(coffee, None, UserSpec("agenda"))


def test_each_environment_has_its_own():
    with pytest.raises(ConfigError, match=r"--gopo\.user agenda: the own simulator of star is replay"):
        load_environment("star", STAR, UserSpec("agenda"))
    plain, named = load_environment("star", STAR), load_environment("star", STAR, UserSpec("replay"))
    goal = plain.goals("train")[0]
    assert words(plain, goal) == words(named, goal)
    assert not named.blocking
    assert play(plain, goal, 0, 0, ScriptedPolicy()).user == "replay"


def test_an_endpoint_may_not_take_longer_than_the_user():
    llm = "agenda=1,llm:m@http://h/v1=1"
    with pytest.raises(ConfigError, match=r"--gopo\.llm\.timeout 15\.0: give less than --gopo\.user_timeout 9\.0"):
        GopoConfig(env="shop", user=llm, user_timeout=9.0)
    GopoConfig(env="shop", user_timeout=9.0)
    GopoConfig(env="shop", user=llm, user_timeout=9.0, llm=LlmConfig(timeout=3.0))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("timeout", 0.0),
        ("attempts", 0),
        ("concurrency", 0),
        ("max_new_tokens", 0),
        ("budget_requests", 0),
        ("budget_tokens", -5),
        ("extra_body", "{"),
        ("extra_body", "[1]"),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(ConfigError) as caught:
        LlmConfig(**{setting: value})
    assert str(caught.value).startswith(f"--gopo.llm.{setting} {value}: give ")


def test_a_key_in_the_place_of_its_name_is_not_shown():
    with pytest.raises(ConfigError, match=r"--gopo\.llm\.api_key_env .*not the key") as caught:
        LlmConfig(api_key_env="sk-secret")
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- mixtures


def test_each_dialogue_draws_by_weight_from_its_seed(plugin):
    env = shop(f"agenda=3,{plugin}:Shouts=1")
    goal = env.goals("train")[0]
    drawn = [play(env, goal, 0, seed, ScriptedPolicy()).user for seed in range(400)]
    assert drawn == [play(env, goal, 0, seed, ScriptedPolicy()).user for seed in range(400)]
    counts = Counter(drawn)
    assert counts.keys() == {"agenda", f"{plugin}:Shouts"}
    assert 270 < counts["agenda"] < 330  # 300 expected; a standard deviation is 8.7
    others = [play(env, other, 0, 0, ScriptedPolicy()).user for other in env.goals("train")[:100]]
    assert len(set(others)) == 2


def test_a_mixture_may_wait_when_one_of_it_may(plugin):
    assert not shop(f"agenda=1,{plugin}:Shouts=1").blocking
    assert shop(f"agenda=1,{plugin}:Fails=1").blocking


def test_the_simulator_is_recorded_and_makes_slices(plugin, tmp_path, policy):
    env = shop(f"agenda=1,{plugin}:Shouts=1")
    goal = env.goals("train")[0]

    def rollout(seed):
        return asyncio.run(
            run_dialogue(env, goal, SampledPolicy(policy, Engine(policy).generators(), LIMITS), LIMITS, seed=seed)
        )

    trajectories = [rollout(seed) for seed in range(8)]
    assert all(t.error is None for t in trajectories)
    for trajectory in trajectories:
        assert trajectory.turns[0].user.isupper() == (trajectory.user != "agenda")
        append_trajectory(tmp_path / "t.jsonl", trajectory)
    read = read_trajectories(tmp_path / "t.jsonl")
    assert [t.user for t in read] == [t.user for t in trajectories]
    by_user = {name: len(members) for name, members in slices(read).items() if name.startswith("user: ")}
    assert by_user == {f"user: {name}": count for name, count in Counter(t.user for t in read).items()}
    assert len(by_user) == 2
    assert not [name for name in slices([t for t in read if t.user == "agenda"]) if name.startswith("user: ")]


def test_one_simulator_that_fails_costs_its_own_dialogues_only(plugin, policy):
    env = shop(f"agenda=1,{plugin}:Fails=1")
    goal = env.goals("train")[0]

    async def rollout():
        engine = Engine(policy)
        runs = [
            run_dialogue(env, goal, SampledPolicy(policy, engine.generators(), LIMITS), LIMITS, seed=seed)
            for seed in range(10)
        ]
        return await asyncio.gather(*runs)

    ended = asyncio.run(rollout())
    failed = [t for t in ended if t.stop is StopReason.FAILED]
    assert 0 < len(failed) < 10
    assert all("OSError: no more words" in t.error for t in failed)
    assert all(t.turns and t.user == "agenda" for t in ended if t not in failed)


# ---------------------------------------------------------------------------------------------- what is said, and how


class Says(UserSimulator):
    blocking = False

    def __init__(self, text):
        self.text, self.cues = text, []

    def say(self, cue):
        self.cues.append(cue)
        return self.text


@pytest.mark.parametrize("text", ["", "  \n", None, 7, "x" * (MAX_UTTERANCE + 1), "x" * 1_000_000])
def test_an_utterance_is_text_within_a_limit(text):
    with pytest.raises(
        DialogueError, match=r"^--gopo\.user odd: (said .* non-empty|.*users\.base\.MAX_UTTERANCE)"
    ) as e:
        Voice("odd", Says(text), {}, "g/0").say("hello")
    assert len(str(e.value)) < 300
    assert Voice("odd", Says("x" * MAX_UTTERANCE), {}, "g/0").say("hello") == "x" * MAX_UTTERANCE


def test_a_cue_holds_what_the_customer_knows():
    user = Says("fine")
    voice = Users([Share("odd", user)]).draw({"type": "calm"}, "g/0")
    voice.say("it is A5", values=["A5", "A5"], acts=["tell.order_id"], told={"order_id": "A5"}, heard="Which order?")
    voice.say("bye")
    persona = {"type": "calm"}
    first = Cue("it is A5", ("A5",), ("tell.order_id",), persona, {"order_id": "A5"}, "Which order?", "g/0/0")
    assert user.cues == [first, Cue("bye", persona=persona, key="g/0/1")]


def test_the_shop_tells_a_simulator_no_more_than_the_customer_said_and_heard():
    env = load_environment("shop")
    user = Says("hm")
    env.users = Users([Share("odd", user)])
    for goal in env.goals("train")[:200]:
        user.cues.clear()
        trajectory = play(env, goal, 0, 3, ScriptedPolicy(0.7, slip=0.0))
        unheard = trajectory.stop is StopReason.MAX_TURNS  # an answer to the last reply
        assert len(user.cues) == len(trajectory.turns) + unheard
        assert user.cues[0].heard == ""
        said = ""
        for cue, turn in zip(user.cues[1:], trajectory.turns, strict=False):
            assert cue.heard == turn.reply
        for cue in user.cues:
            said += " " + cue.draft
            assert all(value in cue.draft for value in cue.values)
            told = {fact for fact in cue.told if fact not in ("need", "photo", "wish")}
            assert all(cue.told[fact].strip("$") in said for fact in told), (cue, said)
            assert cue.told.items() <= goal.facts.items()
    assert any(cue.values for cue in user.cues)


def test_star_tells_a_simulator_the_values_of_its_words():
    env = load_environment("star", STAR)
    user = Says("hm")
    env.users = Users([Share("odd", user)])
    for goal in env.goals("train"):
        play(env, goal, 0, 0, ScriptedPolicy())
    cues = [cue for cue in user.cues if cue.values]
    assert cues
    assert all(value.casefold() in cue.draft.casefold() for cue in cues for value in cue.values)
    assert any(act.startswith("tell ") for cue in cues for act in cue.acts)
    assert any(cue.heard for cue in user.cues)


def test_own_words_pass_as_they_are():
    text = "what?\n ok, <b>A5</b>"
    assert Voice("agenda", AsDrafted(), {}, "").say(text, values=["missing"]) == text


def test_environments_with_other_users_keep_the_contract(plugin):
    check_env(shop(f"agenda=1,{plugin}:Shouts=1"), goals=3)
    check_env(load_environment("star", STAR, UserSpec(f"replay=1,{plugin}:Shouts=1")), goals=3)


def test_equal_seeds_give_equal_words():
    env, again = shop("agenda"), load_environment("shop")
    for goal in env.goals("train")[:20]:
        assert words(env, goal, seed=4) == words(again, goal, seed=4)
    assert any(words(env, goal, seed=4) != words(env, goal, seed=5) for goal in env.goals("train")[:20])


def test_what_travels_to_the_rollouts_pickles_and_hashes():
    spec = UserSpec("llm:m@http://h/v1", LlmConfig(cache="x.sqlite"), 30.0)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))


def test_a_goal_without_persona_has_a_voice_too():
    env = load_environment("shop")
    assert env.voice(Goal("g", "x", "", {"a": 1.0}), 0).say("hello") == "hello"
