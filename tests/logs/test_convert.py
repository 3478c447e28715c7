"""The converters: on small folders written here, and on the real data where it is present."""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.base import HumanTurn
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.logs import convert as module
from openrlhf_gopo.logs import played, read, to_trajectory, validate
from openrlhf_gopo.logs.check import fits
from openrlhf_gopo.logs.convert import convert

MGSHOP = Path(__file__).parent / "mgshop_fixture"
FIXTURES = Path(__file__).parents[1] / "envs"
STAR, ABCD, MULTIWOZ = (FIXTURES / f"{name}_fixture" for name in ("star", "abcd", "multiwoz"))


def real_folder(name):
    """The real data of ``name``, or a skip."""
    flag = f"GOPO_{name.upper()}_DATA"
    path = Path(os.environ.get(flag) or Path(__file__).parents[3] / "shared" / "data" / name)
    if not path.is_dir():
        pytest.skip(f"no {name} data at {path}; set {flag} to a folder in upstream's layout")
    return path


def goals_of(env):
    return {goal.id: goal for split in ("train", "heldout") for goal in env.goals(split)}


def converted(source, folder, out):
    count = convert(source, folder, out)
    dialogues = [dialogue for _, dialogue in read(out)]
    assert len(dialogues) == count
    return dialogues


def test_mgshop_turn_by_turn(tmp_path):
    first, second = converted("mgshop", MGSHOP, tmp_path / "new" / "out.jsonl")
    turns = [(t.user, t.strategy, t.reply, t.events, t.completed) for t in first.turns]
    assert turns == [
        ("", "greeting", "Hi!", ("reply", "answer"), ()),
        ("Hello, I look for a tent", "elicit", "For how many people?", ("answer", "positive"), ("elicit",)),
        ("Two, great question", "recommend", "Take the Dome 2. It is green.", ("question",), ("recommend",)),
        ("What does it cost?", "answer", "90 dollars.", (), ("answer",)),
        ("", "explain", "It weighs 2 kg.", ("positive",), ("accept",)),
    ]
    assert (first.goal.id, first.goal.intent, first.goal.facts) == (
        "mgshop-7",
        "Tents",
        {"scenario": "You want a tent for two."},
    )
    assert "for two" not in first.goal.context  # the scenario is the client's alone
    assert (first.outcome.stop.value, first.outcome.success) == ("completed", True)
    assert [(t.user, t.strategy, t.reply) for t in second.turns] == [("A tent, please", None, "We have none.")]
    assert (second.outcome.stop.value, second.outcome.success) == ("closed", False)
    assert second.goal.id == first.goal.id


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d[1].pop("metadata"), "MGShopDial.json:[1].metadata: Field required: add it"),
        (lambda d: d[0]["utterances"][3].pop("utterance"), "MGShopDial.json:[0].utterances[3].utterance: Field requir"),
        (
            lambda d: d[0]["utterances"][3].update(participant="Owner"),
            "MGShopDial.json:[0].utterances[3].participant: Input should be 'Client', 'Wizard' or 'Assistant', got 'O",
        ),
        (lambda d: d[0]["utterances"][0].update(intents=["greeting"]), "MGShopDial.json:[0].utterances[0].intents[0]"),
        (lambda d: d[1]["utterances"].pop(), "MGShopDial.json:[1]: turns: Tuple should have at least 1 item"),
        (lambda d: d[1]["utterances"][1].update(utterance=" "), "MGShopDial.json:[1]: turns[0].reply: '' is blank"),
        (lambda d: d[1].update(id="Tents:7:1:2"), "2:id: 'Tents:7:1:2' is also the id of line 1"),
        (lambda d: d.clear(), "1: the file holds no dialogue"),
    ],
)
def test_mgshop_in_another_layout_is_refused_and_nothing_is_written(tmp_path, change, expected):
    data = json.loads((MGSHOP / "MGShopDial.json").read_text())
    change(data)
    (tmp_path / "MGShopDial").mkdir()
    (tmp_path / "MGShopDial" / "MGShopDial.json").write_text(json.dumps(data))
    out = tmp_path / "out.jsonl"
    out.write_text("as it was")
    with pytest.raises(DataError) as error:
        convert("mgshop", tmp_path, out)
    assert expected in str(error.value)
    assert out.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MGShopDial", "out.jsonl"]


def test_a_source_or_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"source 'abc': no such converter; choose one of .*mgshop.*star"):
        convert("abc", tmp_path, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="no such folder; give the one that holds the star data"):
        convert("star", tmp_path / "none", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"no MGShopDial\.json in it"):
        convert("mgshop", tmp_path, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="is a folder; name the"):
        convert("mgshop", MGSHOP, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_source_is_one_function(tmp_path, monkeypatch):
    def records(folder):
        turn = {"user": "Hi", "strategy": "greet", "reply": folder.name, "completed": ["greet"]}
        goal = {"intent": "hello", "context": "", "subgoals": {"greet": 1.0}}
        outcome = {"stop": "completed", "success": True}
        yield "here", {"id": "1", "source": "s", "language": "en", "goal": goal, "turns": [turn], "outcome": outcome}
        yield "there", {"id": "2"}

    monkeypatch.setitem(module.SOURCES, "mine", records)
    with pytest.raises(DataError, match=r"^there: source: Field required: add it$"):
        convert("mine", tmp_path, tmp_path / "out.jsonl")


def star_records():
    return [json.loads(text) for text in (STAR / "dialogues_01.jsonl").read_text(encoding="utf-8").splitlines()]


def test_star_keeps_goals_words_and_tool_results(tmp_path):
    env = Star.load(str(STAR))
    goals = goals_of(env)
    dialogues = converted("star", STAR, tmp_path / "out.jsonl")
    assert validate(tmp_path / "out.jsonl", fits(env)).found == 0
    assert {dialogue.id for dialogue in dialogues} == goals.keys()
    raw = {f"star-{record['DialogueID']}": record for record in star_records()}
    for dialogue in dialogues:
        goal = to_trajectory(dialogue).goal
        assert (goal.id, goal.intent, goal.context) == (dialogue.id, goals[goal.id].intent, goals[goal.id].context)
        assert goal.subgoals == goals[goal.id].subgoals
        said = [e["Text"] for e in raw[dialogue.id]["Events"] if e["Action"] in ("utter", "pick_suggestion")]
        spoken = [text for turn in dialogue.turns for text in (turn.user, turn.reply)]
        assert spoken == said[: len(spoken)]
        assert len(said) - len(spoken) <= 1  # the customer's words after the last reply


def test_star_played_through_its_environment(tmp_path):
    """What the wizards did, queries included, with what was allowed; every turn is one that the environment has."""
    env = Star.load(str(STAR))
    assert convert("star", STAR, tmp_path / "out.jsonl", through_env=True) == 12
    fitting = fits(env)
    for _, dialogue in read(tmp_path / "out.jsonl", fitting):
        goal = goals_of(env)[dialogue.goal.id]
        assert [turn.strategy for turn in dialogue.turns] == [turn.strategy for turn in env.human(goal)]
        assert any(turn.strategy.startswith("query") for turn in dialogue.turns)
        talk = env.start(goal, 0)
        seen = talk.opening
        for turn in dialogue.turns:
            assert (turn.user.strip(), turn.allowed) == (seen.user.strip(), seen.allowed)
            assert turn.strategy in turn.allowed
            outcome = talk.step(turn.strategy, turn.reply)
            assert (turn.completed, turn.engagement) == (outcome.completed, outcome.engagement)
            seen = outcome.next
        assert dialogue.outcome.success
        assert outcome.stop.value == dialogue.outcome.stop.value == "completed"


def test_played_leaves_out_what_is_forbidden_or_unknown(caplog):
    """A dialogue goes on after such a turn; one of which no turn can be played is left out."""
    env = Star.load(str(STAR))
    path = [*env.human(env.goals("train")[0])]
    odd = HumanTurn("", "", "Well."), HumanTurn("", "table_booked", "Booked!")  # nothing was looked up yet
    env.human = lambda goal: [*odd, *path] if goal.id == "star-0" else odd
    ((where, record),) = played.records(env, STAR)
    assert where.endswith("dialogue 0")
    assert [turn["strategy"] for turn in record["turns"]] == [turn.strategy for turn in path]
    assert record["outcome"] == {"stop": "completed", "success": True, "rating": 1.0}
    assert caplog.messages == [
        "star: 12 turns not played: strategy unknown",
        "star: 12 turns not played: forbidden",
        "star: 11 dialogues left out: no turn",
    ]


def test_only_an_environment_can_play(tmp_path):
    with pytest.raises(ConfigError, match=r"--played: mgshop is no environment; .* one of abcd"):
        convert("mgshop", MGSHOP, tmp_path / "out.jsonl", through_env=True)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return converted("star", real_folder("star"), tmp_path_factory.mktemp("star") / "out.jsonl")


def test_the_real_star_dialogues_fit_the_environment(real):
    env = Star.load(str(real_folder("star")))
    goals = goals_of(env)
    check = fits(env)
    assert {dialogue.id for dialogue in real} == goals.keys()
    assert not any(problem for dialogue in real for problem in check(dialogue))
    turns = [turn for dialogue in real for turn in dialogue.turns]
    assert 0.8 < sum(turn.strategy is not None for turn in turns) / len(turns) < 0.95  # 86% of all carry a label
    assert 0.5 < sum(dialogue.outcome.success for dialogue in real) / len(real) < 0.8


def test_what_a_real_wizard_reports_is_in_the_briefing(real):
    """Values in the wizards' reports come from the tool result that their briefing shows."""
    reports = [t for d in real for t in d.turns if any(c.startswith("report:") for c in t.completed) and t.strategy]
    assert len(reports) > 1000
    shown = [turn for turn in reports if "Tool result: " in turn.briefing]
    assert len(shown) == len(reports)
    assert all(turn.on_task and turn.engagement == 1.0 for turn in reports if turn.engagement is not None)


def test_every_slot_of_a_real_goal_is_told_in_one_turn(real):
    for dialogue in real:
        done = [name for turn in dialogue.turns for name in turn.completed]
        assert {name for name in dialogue.goal.subgoals if name.startswith("slot:")} <= set(done)


def test_a_folder_without_dialogues_is_refused(tmp_path):
    shutil.copytree(STAR, tmp_path / "star", ignore=shutil.ignore_patterns("dialogues*"))
    with pytest.raises(DataError, match="neither dialogues"):
        convert("star", tmp_path / "star", tmp_path / "out.jsonl")


def done(dialogue):
    """(strategy, completed, on_task) of every turn."""
    return [(turn.strategy, turn.completed, turn.on_task) for turn in dialogue.turns]


def changed(source, name, tmp_path, change):
    """A copy of ``source`` whose file ``name`` went through ``change``."""
    shutil.copytree(source, tmp_path / "data")
    path = tmp_path / "data" / name
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))
    return tmp_path / "data"


def test_abcd_turn_by_turn(tmp_path):
    found = {dialogue.id: dialogue for dialogue in converted("abcd", ABCD, tmp_path / "out.jsonl")}
    whole, refused = found["abcd-11"], found["abcd-12"]
    assert done(whole) == [
        ("ask:pull-up-account", ("slot:customer_name",), True),
        ("pull-up-account", ("do:pull-up-account",), True),
        ("ask:validate-purchase", ("slot:email", "slot:order_id", "slot:username"), True),
        ("validate-purchase", ("do:validate-purchase",), True),
        ("ask:membership", ("slot:membership_level",), True),
        ("reply", (), True),  # "How long do I have?"
        ("membership", ("do:membership",), True),
        ("update-order", ("do:update-order",), True),
        ("anything_else", (), True),
        ("goodbye", ("close:goodbye",), True),
    ]
    assert (whole.outcome.stop.value, whole.outcome.success) == ("completed", True)
    click = whole.turns[1]
    assert (click.user, click.reply) == ("Ann Lee", "Account has been pulled up for Ann Lee.")  # a click without words
    assert click.briefing.endswith("Entered: Ann Lee.")
    assert (click.engagement, click.events) == (None, ())  # nobody reacted to it
    # Without the membership check: neither "anything else" nor the goodbye was due.
    assert done(refused)[-2:] == [("anything_else", (), False), ("goodbye", (), False)]
    assert (refused.outcome.stop.value, refused.outcome.success) == ("closed", False)
    assert (refused.turns[-2].engagement, refused.turns[-1].engagement) == (0.4, 0.4)


def test_an_abcd_click_outside_the_flows_catalogue_has_no_strategy(tmp_path):
    def oracle(talks):
        talks[2]["original"][4][1] = "Asked."
        talks[2]["delexed"][4]["targets"][2:4] = ["ask-the-oracle", []]
        return {"train": talks[:2] + talks[3:], "test": [talks[2]]}

    folder = changed(ABCD, "dialogues_dev.json", tmp_path, oracle)
    (folder / "dialogues_dev.json").rename(folder / "abcd_v1.1.json")
    found = {dialogue.id: dialogue for dialogue in converted("abcd", folder, tmp_path / "out.jsonl")}
    turn = found["abcd-13"].turns[1]
    assert (turn.strategy, turn.reply, turn.briefing, turn.completed) == (None, "Asked.", "", ())
    assert not found["abcd-13"].outcome.success
    assert validate(tmp_path / "out.jsonl", fits(load_environment("abcd", str(folder)))).found == 0


def test_multiwoz_turn_by_turn(tmp_path):
    single, multi = converted("multiwoz", MULTIWOZ, tmp_path / "out.jsonl")
    if single.id != "multiwoz-SNG1":
        single, multi = multi, single
    assert done(single) == [
        ("no_offer", (), True),
        ("offer", ("inform:restaurant",), True),
        ("inform", ("request:restaurant",), True),
        ("no_book", (), True),
        ("book", ("book:restaurant",), True),
        ("goodbye", (), True),
    ]
    assert done(multi) == [
        ("ask:day", (), True),
        ("offer", ("inform:train",), True),
        ("inform", ("request:train",), True),
        ("ask:destination", (), True),
        ("book", ("book:taxi",), True),
        ("goodbye", (), True),
    ]
    assert [(d.outcome.stop.value, d.outcome.success) for d in (single, multi)] == [("completed", True)] * 2
    assert "Database: 0 of restaurant for type of food greek" in single.turns[0].briefing
    assert "name: the blue duck" in single.turns[1].briefing
    assert single.turns[4].briefing.endswith("reference: QQ77")


def unasked(talks):  # the phone number comes with the offer, and nobody asks for it
    log = talks["SNG1"]["log"]
    log[3]["text"] += " Call them on 01111 ."
    del log[4:6]


def never(talks):
    del talks["SNG1"]["log"][4:6]


def unbooked(talks):  # and the goodbye comes too early
    del talks["SNG1"]["log"][8:10]


def twice(talks):
    log = talks["SNG1"]["log"]
    log[2:2] = log[:2]
    log[2:2] = [
        {"text": "Hm .", "dialog_act": {}},
        {"text": "What day ?", "dialog_act": {"Restaurant-Request": [["Day", "?"]]}},
    ]
    log[10]["text"] = "Book it for 2 on monday , at 17:00 ."


def early(talks):  # before the user said where; and it is another one, until the user asks for its number
    log = talks["SNG1"]["log"]
    del log[2]["dialog_act"]["Restaurant-Inform"][1]
    log[2]["text"] = "Then thai ."
    log[3]["text"] = "The Red Hen is nice ."


def lucky(talks):
    early(talks)
    talks["SNG1"]["log"][3]["text"] = "The Blue Duck is nice ."


@pytest.mark.parametrize(
    ("change", "turns", "left"),
    [
        (early, [(1, (), False)], {"inform:restaurant"}),
        (lucky, [(1, ("inform:restaurant",), True)], set()),
        (unasked, [(1, ("inform:restaurant", "request:restaurant"), True)], set()),
        (never, [(1, ("inform:restaurant",), True), (-1, (), False)], {"request:restaurant"}),
        (unbooked, [(-1, (), False)], {"book:restaurant"}),
        (twice, [(0, (), True), (1, (), True), (2, (), False)], set()),  # one refusal was due, not two
    ],
)
def test_what_completes_a_multiwoz_subgoal(tmp_path, change, turns, left):
    folder = changed(MULTIWOZ, "val.json", tmp_path, change)
    found = {dialogue.id: dialogue for dialogue in converted("multiwoz", folder, tmp_path / "out.jsonl")}
    dialogue = found["multiwoz-SNG1"]
    assert [(index, *done(dialogue)[index][1:]) for index, *_ in turns] == turns
    assert set(dialogue.goal.subgoals) - {name for turn in dialogue.turns for name in turn.completed} == left
    assert dialogue.outcome.stop.value == ("closed" if left else "completed")


def agreement(dialogues, env):
    """How often converter and environment say the same of a turn: its briefing, the subgoals, whether it is on task.

    The environment plays the human's strategies, as far as it allows them, with a user of unlimited patience.
    """
    same, goals = Counter(), goals_of(env)
    for dialogue in dialogues:
        goal = goals[dialogue.id]
        talk = env.start(replace(goal, persona={**goal.persona, "patience": math.inf}), 0)
        seen = talk.opening
        for turn in dialogue.turns:
            if seen is None or turn.strategy not in seen.allowed:
                continue
            briefing = talk.briefing(turn.strategy)
            outcome = talk.step(turn.strategy, talk.reference_reply(turn.strategy))
            same["turns"] += 1
            same["briefing"] += turn.briefing == briefing
            same["completed"] += set(turn.completed) == set(outcome.completed)
            same["on_task"] += turn.on_task == outcome.on_task
            seen = outcome.next
    return same


@pytest.mark.parametrize(("name", "turns"), [("abcd", 28), ("multiwoz", 12)])
def test_on_the_humans_path_converter_and_environment_agree(tmp_path, name, turns):
    folder = FIXTURES / f"{name}_fixture"
    env, dialogues = load_environment(name, str(folder)), converted(name, folder, tmp_path / "out.jsonl")
    for dialogue in dialogues:  # what export_sft --logs asks for
        assert env.catalogue(to_trajectory(dialogue).goal) == env.catalogue(goals_of(env)[dialogue.id])
    assert agreement(dialogues, env) == dict.fromkeys(("turns", "briefing", "completed", "on_task"), turns)


@pytest.mark.parametrize(("name", "success", "agreed"), [("abcd", (0.45, 0.7), 0.95), ("multiwoz", (0.8, 0.95), 0.75)])
def test_the_real_dialogues_fit_their_environment(tmp_path, name, success, agreed):
    folder = real_folder(name)
    env = load_environment(name, str(folder))
    dialogues = converted(name, folder, tmp_path / "out.jsonl")
    goals, check = goals_of(env), fits(env)
    assert {dialogue.id for dialogue in dialogues} == goals.keys()
    assert not any(problem for dialogue in dialogues for problem in check(dialogue))
    for dialogue in dialogues:
        goal, logged = goals[dialogue.id], to_trajectory(dialogue).goal
        for field in ("intent", "context", "subgoals", "facts"):
            assert getattr(logged, field) == getattr(goal, field)
        human = [(turn.user, turn.strategy or None) for turn in env.human(goal)]
        assert [(turn.user, turn.strategy) for turn in dialogue.turns] == human
    low, high = success
    assert low < sum(dialogue.outcome.success for dialogue in dialogues) / len(dialogues) < high
    same = agreement(dialogues[:100], env)
    assert min(same["completed"], same["on_task"]) > agreed * same["turns"]
