"""Dialogues over several tasks in the environment star: one written here over two tasks, and those of the real data."""

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.errors import DataError, SopError
from openrlhf_gopo.evaluation.human import sop_share
from openrlhf_gopo.logs import star as logs
from openrlhf_gopo.types import StopReason

_SPEC = importlib.util.spec_from_file_location("human_data", Path(__file__).with_name("human_data.py"))
human = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(human)
best, everything, play, wander = human.best, human.everything, human.play, human.wander
FIXTURE = Path(__file__).parent / "star_fixture"
SKY = {
    "hello": "Hello, how can I help?",
    "ask_name": "Your name, please?",
    "sky_ask_time": "The sky at what time?",
    "sky_tell": "It will be {weather:s} at {time:s}.",
    "out_of_scope": "Sorry, I only know the sky.",
    "goodbye_1": "Thank you and goodbye.",
}


def user(text):
    return {"Agent": "User", "Action": "utter", "Text": text}


def wizard(label, text):
    return {"Agent": "Wizard", "Action": "pick_suggestion", "ActionLabel": label, "Text": text}


def query(api, item, **values):
    constraints = [{slot: f'"{value}"'} for slot, value in values.items()]
    return [
        {"Agent": "Wizard", "Action": "query", "APIName": api, "Constraints": constraints},
        {"Agent": "KnowledgeBase", "Action": "return_item", "APIName": api, "Item": {"APIName": api, **item}},
    ]


def table(message, **values):
    return query("table_book", {"RestaurantName": "The Oak", **message}, CustomerName="Ann", Time="8 pm", **values)


EVENTS = [
    user("A table for tonight please"),
    wizard("ask_name", "Your name, please?"),
    user("I am Ann."),
    wizard("table_ask_time", "For what time?"),
    user("At 8 pm."),
    *table({"Message": "Available"}, RequestType="Check"),
    wizard("table_ask_confirm", "The Oak has a table. Shall I book it?"),
    user("Wait a moment."),
    wizard("", "Take your time, there is no hurry at all."),
    user("What will the sky be like?"),
    wizard("sky_ask_time", "The sky at what time?"),
    user("At 9 pm when we leave."),
    *query("sky", {"Weather": "clear"}, UserName="Ann", Time="9 pm"),
    wizard("sky_tell", "It will be clear at 9 pm."),
    user("Lovely, then book the table."),
    *table({"ReservationStatus": "Reservation Confirmed"}, RequestType="Book"),
    wizard("table_booked", "Your table at The Oak is booked!"),
    user("Great."),
    wizard("goodbye_1", "Thank you and goodbye."),
]


def load(root, *events):
    """The small folder with a second task: three of its dialogues, and one over both tasks per ``events``."""
    shutil.copytree(FIXTURE, root, dirs_exist_ok=True)
    (root / "tasks/sky").mkdir(exist_ok=True)
    task = {"replies": {**SKY, "query": "Query"}, "graph": {"sky_ask_time": "query", "query": "sky_tell"}}
    api = {"input": [{"Name": "UserName"}, {"Name": "Time"}], "required": ["Time"]}
    (root / "tasks/sky/sky.json").write_text(json.dumps(task))
    (root / "tasks/sky/responses.json").write_text(json.dumps(SKY))
    (root / "apis/apis/sky.json").write_text(json.dumps(api))
    alone = [json.loads(line) for line in (FIXTURE / "dialogues_01.jsonl").read_text().splitlines()[:3]]
    scenario = alone[0]["Scenario"] | {"Happy": False, "UserTask": "Secretly you love clear skies."}
    scenario["WizardCapabilities"] = [{"Task": "sky"}, {"Task": "table_book"}]
    both = [alone[0] | {"DialogueID": 70 + i, "Scenario": scenario, "Events": e} for i, e in enumerate(events)]
    (root / "dialogues_01.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*alone, *both]))
    return Star.load(str(root))


@pytest.fixture
def both(tmp_path):
    env = load(tmp_path, EVENTS)
    return env, next(goal for goal in everything(env) if goal.intent == "sky+table_book")


@pytest.fixture(scope="module")
def real():
    env = copy.copy(human.real_data("star"))
    listed = {split: [g for g in env.goals(split) if "+" in g.intent] for split in ("train", "heldout")}
    env.goals = listed.__getitem__
    return env


def after(env, goal, *strategies):
    """The dialogue after ``strategies``, and what was observed last."""
    talk = env.start(goal, 0)
    seen = talk.opening
    for strategy in strategies:
        seen = talk.step(strategy, talk.reference_reply(strategy)).next
    return talk, seen


TABLE_FOUND = ("ask_name", "table_ask_time", "table_book_query_check", "table_ask_confirm")


def test_the_tasks_are_played_in_the_order_and_the_words_of_the_human(both):
    turns = play(*both, best)
    assert [strategy for _, strategy, _ in turns] == [
        *TABLE_FOUND,
        *("sky_ask_time", "sky_query", "sky_tell"),
        *("table_book_query_book", "table_booked", "goodbye"),
    ]
    said = [text for text, _, _ in turns]
    assert said[:3] == ["A table for tonight please", "I am Ann.", "At 8 pm."]
    assert said[4:6] == ["Wait a moment.\nWhat will the sky be like?", "At 9 pm when we leave."]
    assert said[7] == "Lovely, then book the table."
    assert turns[-1][2].stop is StopReason.COMPLETED
    assert sop_share(both[0], [both[1]]).broken == {}


def test_a_goal_holds_all_tasks_and_shared_things_once(both):
    env, goal = both
    ids = [strategy.id for strategy in env.catalogue(goal)]
    shared = ["hello", "ask_name", "anything_else", "out_of_scope", "goodbye"]
    assert [ids.count(strategy) for strategy in shared] == [1] * 5
    assert {"table_book_query_check", "table_book_query_book", "sky_query"} <= set(ids)
    assert not {"query", "query_check", "query_book"} & set(ids)
    # One name for both tasks; two times.
    assert goal.facts == {"UserName": "Ann", "table_book.Time": "8 pm", "sky.Time": "9 pm"}
    assert sum(goal.subgoals.values()) == pytest.approx(1)
    assert set(goal.subgoals) == {
        *("slot:UserName", "slot:table_book.Time", "slot:sky.Time"),
        *("report:1:table_ask_confirm", "report:2:sky_tell", "report:3:table_booked", "close:goodbye"),
        *("outcome:sky:check", "outcome:table_book:check", "outcome:table_book:book"),
    }
    assert goal.persona["happy"] is False


def test_the_context_names_the_tasks_and_nothing_of_the_user(both):
    assert both[1].context == (
        "Help the user book a table. Task: sky. The tool needs: time. It also takes: user name. "
        "Task: table book. The tool needs: customer name, time."
    )


def test_the_query_of_a_task_waits_for_the_users_wish_and_its_own_slots(both):
    _, seen = after(*both, "ask_name", "table_ask_time")
    assert "table_book_query_check" in seen.allowed
    assert {"sky_query", "table_book_query_book"}.isdisjoint(seen.allowed)
    _, seen = after(*both, *TABLE_FOUND)
    assert {"sky_query", "sky_tell", "table_booked"}.isdisjoint(seen.allowed)  # the time told was the table's
    talk, seen = after(*both, *TABLE_FOUND, "sky_ask_time", "sky_query")
    assert "sky_tell" in seen.allowed
    with pytest.raises(SopError, match="table_booked"):
        talk.step("table_booked", "Booked!")


def test_asked_again_the_user_repeats_the_wish(both):
    _, seen = after(*both, *TABLE_FOUND, "anything_else")
    assert seen.user == "Wait a moment.\nWhat will the sky be like?"


def test_a_wish_said_before_the_report_is_said_again_after_it(tmp_path):
    env = load(tmp_path, [*EVENTS[:8], user("How is the sky at 9 pm?"), *EVENTS[13:]])
    goal = next(goal for goal in everything(env) if "+" in goal.intent)
    _, early = after(env, goal, *TABLE_FOUND[:3], "sky_ask_time")
    _, due = after(env, goal, *TABLE_FOUND[:3], "sky_ask_time", "table_ask_confirm")
    assert early.user == due.user == "How is the sky at 9 pm?"


def test_asked_about_another_task_the_user_does_not_borrow_an_answer(tmp_path):
    env = load(tmp_path, EVENTS, *[[*EVENTS[:12], user("Late."), *EVENTS[13:]]] * 4)
    goal = next(goal for goal in everything(env) if goal.id == "star-70")
    talk, _ = after(env, goal, "ask_name")
    outcome = talk.step("sky_ask_time", "The sky at what time?")
    assert outcome.completed == ()
    assert outcome.events == ("user:generic",)


def test_a_report_is_filled_with_the_values_of_its_own_task(tmp_path):
    first = user("A table at 8 pm, and how will the sky be at 9 pm?")
    env = load(tmp_path, [first, *EVENTS[13:15], wizard("", "Not a cloud up there!"), *EVENTS[2:8], *EVENTS[16:]])
    goal = next(goal for goal in everything(env) if "+" in goal.intent)
    talk, _ = after(env, goal, "sky_query")
    assert talk.reference_reply("sky_tell") == "It will be clear at 9 pm."


def test_dialogues_over_one_task_are_the_same_with_and_without_the_others(tmp_path):
    alone, with_others = load(tmp_path / "alone"), load(tmp_path / "both", *[EVENTS] * 6)  # some of them in train
    for goal in everything(alone):
        assert play(alone, goal, best) == play(with_others, goal, best)
        assert play(alone, goal, wander(0)) == play(with_others, goal, wander(0))


def test_the_desk_does_not_say_that_it_knows_one_task_only(both):
    talk, _ = after(*both)
    assert talk.reference_reply("out_of_scope") == "I am sorry, I don't quite understand what you mean."


def test_a_booking_without_a_check_gets_one_whatever_was_checked_for_another_task(tmp_path):
    env = load(tmp_path, [*EVENTS[:5], *EVENTS[9:]])
    goal = next(goal for goal in everything(env) if "+" in goal.intent)
    asked = [strategy for _, strategy, _ in play(env, goal, best)]
    assert asked.index("sky_tell") < asked.index("table_book_query_check") < asked.index("table_book_query_book")
    assert asked[-1] == "goodbye"


def test_goals_over_several_tasks_have_more_turns_and_rounds(tmp_path):
    again = EVENTS[9:16]
    env = load(tmp_path, EVENTS, [*EVENTS[:10], *again * 9, *EVENTS[-2:]])
    alone, short, long = (next(g for g in everything(env) if g.id == f"star-{i}") for i in (0, 70, 71))
    assert (env.turn_limit(alone), env.turn_limit(short)) == (env.max_turns, 2 * env.max_turns)
    assert (len(env.script(short)[0].rounds), len(env.script(long)[0].rounds)) == (3, 8)
    assert env.census["goals with later rounds cut"] == 1
    assert env.census["over several tasks, unhappy"] == 2
    assert play(env, long, best)[-1][2].stop is StopReason.COMPLETED


def test_a_task_named_twice_is_one_and_a_foreign_query_is_refused(tmp_path):
    broken = [*EVENTS[:5], {**EVENTS[5], "APIName": "golf"}, *EVENTS[6:]]
    with pytest.raises(DataError, match=r"dialogues_01.jsonl:4:Events\[5\].APIName: 'golf'.*sky, table_book"):
        load(tmp_path, broken)
    lines = (tmp_path / "dialogues_01.jsonl").read_text().splitlines()
    one = json.loads(lines[0])
    one["Scenario"]["WizardCapabilities"] *= 2
    (tmp_path / "dialogues_01.jsonl").write_text(json.dumps(one))
    assert [goal.intent for goal in everything(Star.load(str(tmp_path)))] == ["table_book"]


def test_the_checker_accepts_it(both):
    check_env(both[0], public=["Time", "sky.Time"])


# -- the real data -----------------------------------------------------------------------------------------------------


def test_every_real_dialogue_over_several_tasks_is_a_goal(real):
    assert len(everything(real)) == real.census["over several tasks, unhappy"] == 140
    assert real.census["over one task, unhappy"] == 242
    assert max(len(real.catalogue(goal)) for goal in everything(real)) == 44


def test_the_checker_accepts_every_real_one(real):
    # What the wizard was told: today's date and clock, "apartment" as a word of the task.
    told = [
        "Day",
        "City",
        "StartDate",
        "DepartureTime",
        "Time",
        "StartTimeHour",
        "ArrivalLocation",
        "DepartureLocation",
    ]
    told += [f"{task}.Day" for task in ("weather", "meeting_schedule", "party_plan", "apartment_schedule")]
    check_env(real, goals=140, public=[*told, "PartySize", "QuestionNum"])


def test_the_real_wizards_keep_to_the_procedure(real):
    count = sop_share(real, everything(real))
    assert count.share > 0.88
    assert count.turns > 1000


def test_what_is_needed_was_said_before_it_is_used(real):
    """Every slot that a query needs was told by words, or was clear from the opening on."""
    for goal in everything(real):
        script, _ = real.script(goal)
        told = set(script.opening.tells)
        turns = play(real, goal, best)
        done = {name.removeprefix("slot:") for *_, outcome in turns for name in outcome.completed}
        wished = {slot for wish in script.wishes for i in wish for slot in script.said[i].tells}
        assert {slot for current in script.rounds for slot in current.needs} <= told | done | wished
        assert turns == play(real, goal, best)
        play(real, goal, wander(7))


def test_the_converter_writes_them_too(real):
    folder = Path(os.environ.get("GOPO_STAR_DATA") or Path(__file__).parents[3] / "shared" / "data" / "star")
    written = {record["id"] for _, record in logs.records(folder)}
    assert written.issuperset(goal.id for goal in everything(real))
