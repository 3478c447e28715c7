"""The environment multiwoz, on a small folder in MultiWOZ's layout written here, and on the real data if present."""

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.envs.multiwoz import Multiwoz
from openrlhf_gopo.envs.multiwoz_db import chosen, query
from openrlhf_gopo.envs.multiwoz_reader import humans, read
from openrlhf_gopo.errors import ConfigError, DataError, SopError
from openrlhf_gopo.evaluation.human import sop_share
from openrlhf_gopo.types import StopReason

_SPEC = importlib.util.spec_from_file_location("human_data", Path(__file__).with_name("human_data.py"))
shared = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(shared)
best, edit, everything, play, wander = shared.best, shared.edit, shared.everything, shared.play, shared.wander
FIXTURE = Path(__file__).parent / "multiwoz_fixture"


@pytest.fixture
def small():
    return Multiwoz.load(str(FIXTURE))


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def real():
    return shared.real_data("multiwoz")


def goal_of(env, name):
    return next(goal for goal in everything(env) if goal.id == f"multiwoz-{name}")


def test_acts_become_strategies_by_the_table():
    people = {one.id: [turn.strategy for turn in one.turns] for one in humans(read(str(FIXTURE))[1])}
    assert people["SNG1"] == ["no_offer", "offer", "inform", "no_book", "book", "goodbye"]
    assert people["MUL2"] == ["ask:day", "offer", "inform", "ask:destination", "book", "goodbye"]


def test_the_user_replays_the_dialogue_when_the_agent_does_what_the_human_did(small):
    for name in ("SNG1", "MUL2"):
        goal = goal_of(small, name)
        turns = play(small, goal, best)
        assert [(user, strategy) for user, strategy, _ in turns] == [(t.user, t.strategy) for t in small.human(goal)]
        assert turns[-1][2].stop is StopReason.COMPLETED
    assert set(goal_of(small, "MUL2").subgoals) == {"inform:train", "request:train", "book:taxi"}


def test_the_database_decides_what_may_be_presented(small):
    talk = small.start(goal_of(small, "SNG1"), 0)
    assert "no_offer" in talk.opening.allowed
    assert {"offer", "inform", "book"}.isdisjoint(talk.opening.allowed)
    assert "Database: 0 of restaurant" in talk.briefing("no_offer")
    with pytest.raises(SopError, match="offer"):
        talk.step("offer", "The Blue Duck.")
    seen = talk.step("no_offer", "There is none.").next
    assert {"offer", "inform"} <= set(seen.allowed)
    assert "no_offer" not in seen.allowed
    assert "Database: 1 of restaurant for type of food thai, area north." in talk.briefing("offer")
    assert talk.expected("offer") == ("the blue duck",)


def test_a_reply_that_does_not_say_it_completes_nothing(small):
    talk = small.start(goal_of(small, "SNG1"), 0)
    talk.step("no_offer", "There is none.")
    vague = talk.step("offer", "I have something for you.")
    assert (vague.completed, vague.on_task) == ((), False)
    assert talk.step("offer", "The Blue Duck!").completed == ("inform:restaurant",)


def test_an_early_offer_draws_out_the_rest_and_idle_turns_end_it(small):
    talk = small.start(goal_of(small, "MUL2"), 0)
    early = talk.step("offer", talk.reference_reply("offer"))
    assert early.completed == ()
    assert early.next.user == "On monday , to arrive by 10:30 ."
    stops = [talk.step(strategy, "Hm.").stop for strategy in ("ask:day", "ask:people")]
    assert stops[-1] is StopReason.USER_LEFT


def test_queries_compare_times_and_spellings():
    trains = [{"leaveAt": "09:00", "arriveBy": "10:00"}, {"leaveAt": "11:00", "arriveBy": "12:00"}]
    assert query(trains, {"leaveAt": "09:30"}) == trains[1:]
    assert query(trains, {"arriveBy": "12:30"}) == trains[::-1]
    inns = [{"name": "The Old Inn", "type": "guesthouse"}, {"name": "new inn", "type": "hotel"}]
    assert query(inns, {"type": "guest house"}) == inns[:1]
    assert query(inns, {"name": "old inn", "area": "north"}) == inns[:1]
    assert query(inns, {"type": "dontcare"}) == inns
    assert chosen(inns, "I like the New Inn") == inns[1]
    assert chosen([], "") is None


def test_what_is_left_out_is_counted_and_the_lists_hold_out(copy, small):
    assert small.census["left out: nothing in the database"] == 1
    (copy / "val.json").rename(copy / "data.json")
    (copy / "valListFile").write_text("MUL2.json\n")
    env = Multiwoz.load(str(copy))
    assert [goal.id for goal in env.goals("train")] == ["multiwoz-SNG1"]
    assert [goal.id for goal in env.goals("heldout")] == ["multiwoz-MUL2"]


def test_a_zipped_file_reads_the_same(copy, small):
    with zipfile.ZipFile(copy / "val.json.zip", "w") as archive:
        archive.write(copy / "val.json", "val.json")
    (copy / "val.json").unlink()
    assert everything(Multiwoz.load(str(copy))) == everything(small)
    (copy / "val.json.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"val\.json\.zip: not a zip file"):
        Multiwoz.load(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["SNG1"]["log"][1].update(dialog_act={"Zoo-Feed": []}), r"SNG1:log\[1\]\.dialog_act.*'Zoo-Feed'"),
        (lambda d: d["SNG1"]["log"][2].pop("text"), r"val\.json:1:SNG1:log\[2\]\.text"),
        (lambda d: d["SNG1"]["log"][2].update(dialog_act=[1]), r"SNG1:log\[2\]\.dialog_act"),
        (lambda d: d["MUL2"].pop("goal"), r"val\.json:1:MUL2:goal"),
        (lambda d: d["MUL2"]["goal"]["train"].update(info="x"), r"MUL2:goal\.train\.info"),
        (lambda d: [talk.update(goal={}) for talk in d.values()], "no dialogue has a goal"),
        (dict.clear, "no dialogue"),
    ],
)
def test_malformed_data_is_named_by_file_and_field(copy, change, message):
    edit(copy / "val.json", change)
    with pytest.raises(DataError, match=message):
        Multiwoz.load(str(copy))


def test_missing_data_is_an_error_with_a_remedy(copy):
    with pytest.raises(ConfigError, match=r"--gopo\.data"):
        load_environment("multiwoz")
    (copy / "db" / "train_db.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"train_db\.json:1: expected a list"):
        Multiwoz.load(str(copy))
    (copy / "db" / "train_db.json").unlink()
    with pytest.raises(DataError, match=r"train_db\.json: no such file"):
        Multiwoz.load(str(copy))
    (copy / "val.json").write_text("{\n")
    with pytest.raises(DataError, match=r"neither|val\.json:2:column|train_db"):
        Multiwoz.load(str(copy))
    (copy / "val.json").unlink()
    with pytest.raises(DataError, match=r"neither data\.json nor val\.json"):
        Multiwoz.load(str(copy))


@pytest.mark.parametrize("which", ["small", "real"])
def test_the_checker_accepts_it(which, request):
    check_env(request.getfixturevalue(which), goals=10)


def test_the_best_strategies_reach_every_held_out_goal(real):
    assert (len(real.goals("train")), len(real.goals("heldout"))) == (779, 220)
    for goal in real.goals("heldout"):
        assert play(real, goal, best)[-1][2].stop is StopReason.COMPLETED
        assert sum(goal.subgoals.values()) == pytest.approx(1)


def test_random_walks_repeat_with_their_seed(real):
    for index, goal in enumerate(real.goals("heldout")[::10]):
        assert play(real, goal, wander(index), index) == play(real, goal, wander(index), index)


def test_human_agents_keep_to_the_procedure(real):
    assert sop_share(real, real.goals("heldout")).share > 0.9
