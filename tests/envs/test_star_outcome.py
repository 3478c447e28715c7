"""What came of a STAR user's wish: hand-derived cases on the small folder, in the environment and in the log."""

import json
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.envs.star_outcome import news, outcome_ids, standing
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.logs import star, to_trajectory
from openrlhf_gopo.logs.schema import Dialogue
from openrlhf_gopo.rewards.tse import progress, tse
from openrlhf_gopo.types import StopReason

FIXTURE = Path(__file__).parent / "star_fixture"
ANN = json.loads((FIXTURE / "dialogues_01.jsonl").read_text(encoding="utf-8").splitlines()[0])
# Its events: 0 user, 1 ask_name, 2 user, 3-4 check fails, 5 unavailable, 6 user, 7-8 check succeeds, 9 ask_confirm,
# 10 user, 11-12 booking succeeds, 13 booked, 14 user, 15 goodbye.
EVENTS = ANN["Events"]
CHECK, BOOK = "outcome:check", "outcome:book"


def user(text):
    return {"Agent": "User", "Action": "utter", "Text": text}


def wizard(label, text):
    return {"Agent": "Wizard", "Action": "pick_suggestion", "ActionLabel": label, "Text": text}


def returned(message):
    return {**EVENTS[12], "Item": {"APIName": "table_book", "RestaurantName": "The Oak", "Message": message}}


FULL = wizard("table_unavailable", "I am sorry, The Oak is full then.")
REFUSED = [*EVENTS[:6], user("What a pity."), EVENTS[15]]
LATER = [*EVENTS[:14], user("Oh, 1 pm after all."), *EVENTS[3:6], user("Well."), EVENTS[15]]  # booked, then refused
CLAIMED = [*EVENTS[:11], *EVENTS[13:]]  # "booked", and no query did it
UNLABELLED = [*EVENTS[:13], wizard("", "Consider it done, see you then, have a good time."), *EVENTS[14:]]
UNLABELLED_REFUSAL = [*EVENTS[:12], returned("Failed"), wizard("", "It did not work out, too bad."), *EVENTS[14:]]
DECLINED = [*EVENTS[:10], user("No, thanks."), EVENTS[15]]


def loaded(root, events):
    """The small folder, its first dialogue with other events: (environment, its goal, the logged trajectory)."""
    shutil.copytree(FIXTURE, root, dirs_exist_ok=True)
    path = root / "dialogues_01.jsonl"
    others = path.read_text(encoding="utf-8").splitlines()[1:]
    path.write_text("\n".join([json.dumps(ANN | {"Events": events}), *others]))
    env = Star.load(str(root))
    goal = next(g for split in ("train", "heldout") for g in env.goals(split) if g.id == "star-0")
    record = next(record for _, record in star.records(root) if record["id"] == "star-0")
    return env, goal, to_trajectory(Dialogue.model_validate_json(json.dumps(record)))


@pytest.mark.parametrize(
    ("events", "log", "rollout"),
    [
        (EVENTS, {9: [CHECK], 13: [BOOK]}, {CHECK, BOOK}),
        (REFUSED, {}, set()),
        (LATER, {}, set()),
        (CLAIMED, {9: [CHECK], 13: [BOOK]}, {CHECK}),  # the customer was told so; a rollout asks the tool
        (UNLABELLED, {9: [CHECK], 13: [BOOK]}, {CHECK, BOOK}),
        (UNLABELLED_REFUSAL, {9: [CHECK]}, {CHECK}),
        (DECLINED, {9: [CHECK]}, {CHECK}),
    ],
    ids=["booked", "refused", "refused later", "claimed", "unlabelled", "unlabelled refusal", "declined"],
)
def test_what_completes_an_outcome(tmp_path, events, log, rollout):
    """``log``: by the index in EVENTS of the wizard's words, which are the turn's reply."""
    env, goal, logged = loaded(tmp_path, events)
    assert {CHECK, BOOK} <= set(goal.subgoals)
    assert logged.goal.subgoals == goal.subgoals
    found = {name: t.reply for t in logged.turns for name in t.completed if name.startswith("outcome:")}
    words = {
        name: (UNLABELLED if events is UNLABELLED else EVENTS)[at]["Text"] for at, ids in log.items() for name in ids
    }
    assert found == words
    played = play(env, goal, 0, 0, ScriptedPolicy(skill=1.0, slip=0.0))
    assert {name for name in played.completed if name.startswith("outcome:")} == rollout
    assert played.stop is (StopReason.COMPLETED if len(rollout) == 2 else StopReason.CLOSED)
    assert played.success is (len(rollout) == 2)
    assert set(goal.subgoals) - set(played.completed) == {CHECK, BOOK} - rollout


def test_the_tse_of_a_refusal_by_hand(tmp_path):
    """One slot 0.2, one report 0.25, two outcomes 0.25 each (open), the goodbye 0.05: P = 0.5.

    Three turns: the question (0.2, answered: 1.0), the report (answered: 1.0), the goodbye (1.0), all on task: E = 1.
    """
    _, goal, logged = loaded(tmp_path, REFUSED)
    assert goal.subgoals == pytest.approx(
        {"slot:CustomerName": 0.2, "report:1:table_unavailable": 0.25, CHECK: 0.25, BOOK: 0.25, "close:goodbye": 0.05}
    )
    assert progress(logged) == pytest.approx(0.5)
    assert tse(logged) == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("told", "stands"),
    [
        ([], {}),
        ([("check", True)], {0: ["outcome:check"]}),
        ([None, ("check", True), None, ("book", True)], {1: ["outcome:check"], 3: ["outcome:book"]}),
        ([("book", True)], {0: ["outcome:book", "outcome:check"]}),  # what was booked was found
        ([("book", True), ("check", True)], {0: ["outcome:book"], 1: ["outcome:check"]}),
        ([("book", True), ("check", False)], {}),  # the user turned to something else, which is not to be had
        ([("check", True), ("book", True), ("book", False)], {0: ["outcome:check"]}),
        ([("check", False), ("check", True), ("check", True)], {2: ["outcome:check"]}),  # the last wish counts
        (
            [("a:check", True), ("b:check", False), ("b:book", True)],
            {0: ["outcome:a:check"], 2: ["outcome:b:book", "outcome:b:check"]},
        ),
        ([("a:book", True), ("b:check", False)], {0: ["outcome:a:book", "outcome:a:check"]}),  # another task's
    ],
)
def test_the_last_news_of_a_phase_stands(told, stands):
    assert standing(told) == stands


@pytest.mark.parametrize(
    ("label", "result", "fresh", "found"),
    [
        ("table_booked", None, False, ("book", True)),
        ("table_booked", ("check", "fail"), True, ("book", True)),  # its own words, whatever the tool said
        ("table_unavailable", ("check", "ok"), False, ("check", False)),
        ("table_ask_confirm", ("check", "ok"), True, ("check", True)),
        ("ask_name", ("check", "ok"), True, None),
        ("", ("check", "ok"), True, ("check", True)),
        ("", ("check", "empty"), True, ("check", False)),
        ("", ("check", "ok"), False, None),  # small talk later on
        ("", None, False, None),
    ],
)
def test_the_news_of_a_turn(label, result, fresh, found):
    _, manual = (env := Star.load(str(FIXTURE))).script(env.goals("train")[0])
    assert news(manual, label, result, fresh) == found


def test_a_goal_that_was_cut_wants_what_its_rounds_have(tmp_path):
    again = [user("And at 1 pm?"), *EVENTS[3:6]]
    env, goal, _ = loaded(tmp_path, [*EVENTS[:6], *again * 4, *EVENTS[6:]])
    script, manual = env.script(goal)
    assert script.cut
    assert outcome_ids(script, manual) == [CHECK]


def test_questions_about_manners_are_no_verdict(tmp_path):
    calm = {"Question": "Did the AI Assistant stay calm and helpful throughout the dialogue?", "Answer": False}
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    records = [
        ANN | {"UserQuestionnaire": [*ANN["UserQuestionnaire"], calm]},
        ANN | {"DialogueID": 1, "UserQuestionnaire": [calm]},
    ]
    (tmp_path / "dialogues_01.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    env = Star.load(str(tmp_path))
    assert [env.script(goal)[0].record.done for split in ("train", "heldout") for goal in env.goals(split)].count(
        None
    ) == 1
    assert {goal.data["human_success"] for split in ("train", "heldout") for goal in env.goals(split)} == {True, None}
