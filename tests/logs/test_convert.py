"""The converters: on small folders written here, and on the real data where it is present."""

import json
import os
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.logs import convert as module
from openrlhf_gopo.logs import read, to_trajectory, validate
from openrlhf_gopo.logs.check import fits
from openrlhf_gopo.logs.convert import convert

MGSHOP = Path(__file__).parent / "mgshop_fixture"
STAR = Path(__file__).parents[1] / "envs" / "star_fixture"
REAL = Path(os.environ.get("GOPO_STAR_DATA") or Path(__file__).parents[3] / "shared" / "data" / "star")


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
    goals = {goal.id: goal for split in ("train", "heldout") for goal in env.goals(split)}
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


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not REAL.is_dir():
        pytest.skip(f"no STAR data at {REAL}; set GOPO_STAR_DATA to a clone of the STAR repository")
    return converted("star", REAL, tmp_path_factory.mktemp("star") / "out.jsonl")


def test_the_real_star_dialogues_fit_the_environment(real):
    env = Star.load(str(REAL))
    goals = {goal.id: goal for split in ("train", "heldout") for goal in env.goals(split)}
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
