"""The environment abcd, on a small folder in ABCD's layout written here, and on the real data where it is present."""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.abcd import Abcd
from openrlhf_gopo.envs.abcd_reader import read
from openrlhf_gopo.envs.abcd_turns import humans
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.errors import ConfigError, DataError, DialogueError, SopError
from openrlhf_gopo.evaluation.human import sop_share
from openrlhf_gopo.types import StopReason

_SPEC = importlib.util.spec_from_file_location("human_data", Path(__file__).with_name("human_data.py"))
shared = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(shared)
best, edit, everything, play, wander = shared.best, shared.edit, shared.everything, shared.play, shared.wander
FIXTURE = Path(__file__).parent / "abcd_fixture"


@pytest.fixture
def small():
    return Abcd.load(str(FIXTURE))


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def real():
    return shared.real_data("abcd")


def goal_of(env, number):
    return next(goal for goal in everything(env) if goal.id == f"abcd-{number}")


def test_human_dialogues_become_turns():
    people = {one.id: one for one in humans(*read(str(FIXTURE)))}
    assert people["11"].goal["subflow"] == "return_late"
    assert [turn.strategy for turn in people["11"].turns] == [
        *("ask:pull-up-account", "pull-up-account", "ask:validate-purchase", "validate-purchase"),
        *("ask:membership", "reply", "membership", "update-order", "anything_else", "goodbye"),
    ]
    last = people["14"].turns[-2]
    assert (last.strategy, last.reply) == ("select-faq", "We open at 8am on all days.")
    assert last.events == ("FAQ answer related to opening (question1) was selected.",)


def test_the_customer_replays_the_dialogue_when_the_agent_follows_the_guidelines(small):
    goal = goal_of(small, 11)
    turns = play(small, goal, best)
    assert turns[-1][2].stop is StopReason.COMPLETED
    assert "alee1, alee1@mail.test Order ID 4411" in [user for user, _, _ in turns]
    asked = next(index for index, (user, _, _) in enumerate(turns) if user == "I'm silver. How long do I have?")
    assert turns[asked][1] == "reply"  # a question is answered first
    assert turns[asked][2].next.user == "good"
    assert sum(goal.subgoals.values()) == pytest.approx(1)


def test_what_depends_on_the_case_is_required_where_the_human_did_it(small):
    assert "do:update-order" in goal_of(small, 11).subgoals
    assert "do:update-order" not in goal_of(small, 12).subgoals  # refused: after a step that may end the chat
    assert "do:membership" in goal_of(small, 12).subgoals  # left out by the human, but the guideline is plain


def test_lookups_wait_for_their_values_and_other_flows_are_masked(small):
    goal = goal_of(small, 11)
    talk = small.start(goal, 0)
    assert {"pull-up-account", "validate-purchase", "membership", "goodbye"}.isdisjoint(talk.opening.allowed)
    assert not any(strategy.id.startswith("search-") for strategy in small.catalogue(goal))
    with pytest.raises(SopError, match="pull-up-account"):
        talk.step("pull-up-account", "Done.")
    told = talk.step("ask:pull-up-account", "Your name?").next
    assert "pull-up-account" in told.allowed
    assert talk.briefing("pull-up-account").endswith("Entered: Ann Lee.")


def test_the_agent_does_not_see_the_subflow_or_the_customer(small):
    for goal in everything(small):
        assert goal.intent not in goal.context
        assert not any(value in goal.context for value in goal.facts.values())


def test_expected_is_what_was_entered_or_returned(small):
    goal = goal_of(small, 13)
    talk = small.start(goal, 0)
    for strategy in ("ask:pull-up-account", "pull-up-account", "ask:validate-purchase", "validate-purchase"):
        talk.step(strategy, talk.reference_reply(strategy))
    talk.step("ask:offer-refund", "How much?")
    assert talk.expected("offer-refund") == ("30",)
    assert "$30" in talk.reference_reply("offer-refund")


def test_an_early_goodbye_and_an_empty_reply(small):
    goal = goal_of(small, 11)
    talk = small.start(goal, 0)
    silent = talk.step("ask:pull-up-account", "...")
    assert (silent.completed, silent.on_task) == ((), False)
    assert talk.relevance()["ask:pull-up-account"] == 3  # it was not said: it can be said again
    talk.step("reply", "Let me see.")
    assert talk.step("goodbye", "Bye.").stop is StopReason.CLOSED
    with pytest.raises(DialogueError):
        talk.step("goodbye", "Bye.")


def test_upstreams_splits_are_kept_zipped_or_not(copy, small):
    talks = json.loads((copy / "dialogues_dev.json").read_text())
    whole = json.dumps({"train": talks[:2], "dev": talks[2:3], "test": talks[3:]}).encode()
    (copy / "abcd_v1.1.json.gz").write_bytes(gzip.compress(whole))
    env = Abcd.load(str(copy))
    assert [goal.id for goal in env.goals("train")] == ["abcd-11", "abcd-12"]
    assert [goal.id for goal in env.goals("heldout")] == ["abcd-13", "abcd-14"]
    (copy / "abcd_v1.1.json.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(DataError, match=r"abcd_v1\.1\.json\.gz"):
        Abcd.load(str(copy))


def change_targets(talks):
    talks[1]["delexed"][4]["targets"][2] = "fly-away"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("dialogues_dev.json", change_targets, r"dialogues_dev\.json.*12.*delexed\[4\]\.targets\[2\].*'fly-away'"),
        ("dialogues_dev.json", lambda d: d[0].pop("scenario"), r"dialogues_dev\.json.*11.*scenario"),
        ("dialogues_dev.json", lambda d: d[0]["original"].pop(), r"dialogues_dev\.json.*11.*delexed"),
        ("dialogues_dev.json", lambda d: d.append(d[0]), "11 occurs twice"),
        ("dialogues_dev.json", list.clear, "no dialogue"),
        ("kb.json", lambda d: d["opening"].append("fly-away"), r"kb\.json:1:opening\[3\].*'fly-away'"),
        ("guidelines.json", lambda d: d.pop("Returns"), r"guidelines\.json:1:returns"),
    ],
)
def test_malformed_data_is_named_by_file_and_field(copy, file, change, message):
    edit(copy / file, change)
    with pytest.raises(DataError, match=message):
        Abcd.load(str(copy))


def test_missing_data_is_an_error_with_a_remedy(copy):
    with pytest.raises(ConfigError, match=r"--gopo\.data"):
        load_environment("abcd")
    (copy / "kb.json").write_text('{"a": [\n')
    with pytest.raises(DataError, match=r"kb\.json:2:column"):
        Abcd.load(str(copy))
    (copy / "kb.json").unlink()
    with pytest.raises(DataError, match=r"kb\.json: no such file"):
        Abcd.load(str(copy))


def test_silent_customers_leave_no_goal(copy):
    edit(
        copy / "dialogues_dev.json",
        lambda talks: [turn.__setitem__(0, "agent") for t in talks for turn in t["original"]],
    )
    with pytest.raises(DataError, match="no goals"):
        Abcd.load(str(copy))


@pytest.mark.parametrize("which", ["small", "real"])
def test_the_checker_accepts_it(which, request):
    check_env(request.getfixturevalue(which))


def test_the_best_strategies_reach_every_real_goal(real):
    assert len(everything(real)) == real.census["dialogues"]
    for goal in everything(real):
        assert play(real, goal, best)[-1][2].stop is StopReason.COMPLETED
        assert sum(goal.subgoals.values()) == pytest.approx(1)


def test_random_walks_repeat_with_their_seed(real):
    for index, goal in enumerate(everything(real)):
        assert play(real, goal, wander(index), index) == play(real, goal, wander(index), index)


def test_human_agents_keep_to_the_procedure(real):
    assert sop_share(real, real.goals("heldout")).share > 0.9
    assert sop_share(real, real.goals("train")).share > 0.9


def test_values_typed_beside_a_button_that_takes_none_are_no_slots(copy):
    """``search-faq`` takes nothing, whatever the agent typed there and the customer had said."""
    path = copy / "dialogues_dev.json"
    dialogues = json.loads(path.read_text())
    (event,) = (e for e in dialogues[0]["delexed"] if e["targets"][2] == "membership")
    event["targets"][2:4] = ["search-faq", ["silver"]]
    path.write_text(json.dumps(dialogues))
    env = Abcd.load(str(copy))
    assert "search-faq" not in env.case(goal_of(env, 11)).needs
