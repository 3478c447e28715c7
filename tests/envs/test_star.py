"""The environment star, on a small folder in STAR's layout written here, and on the real data where it is present."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.envs.reading import mentions, shorten
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.envs.star_reader import plain
from openrlhf_gopo.errors import ConfigError, DataError, DialogueError, SopError
from openrlhf_gopo.types import StopReason

REAL = Path(os.environ.get("GOPO_STAR_DATA") or Path(__file__).parents[3] / "shared" / "data" / "star")
FIXTURE = Path(__file__).parent / "star_fixture"


def people():
    """The records of the small folder."""
    return [json.loads(text) for text in (FIXTURE / "dialogues_01.jsonl").read_text(encoding="utf-8").splitlines()]


def variant(number, events):
    """A record of the small folder with other events."""
    return people()[0] | {"DialogueID": number, "Events": events}


def write(root, records, suffix="jsonl"):
    """A copy of the small folder with ``records`` as its dialogues."""
    shutil.copytree(FIXTURE, root, dirs_exist_ok=True)
    (root / "dialogues_01.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if suffix == "json":
        (root / "dialogues_01.jsonl").unlink()
        (root / "dialogues").mkdir()
        for record in records:
            (root / f"dialogues/{record['DialogueID']}.json").write_text(json.dumps(record, indent=1))
    return str(root)


@pytest.fixture
def small():
    return Star.load(str(FIXTURE))


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"no STAR data at {REAL}; set GOPO_STAR_DATA to a clone of the STAR repository")
    return Star.load(str(REAL))


def real_records():
    for path in [*REAL.glob("dialogues/*.json"), *REAL.glob("dialogues*.jsonl")]:
        text = path.read_text(encoding="utf-8")
        yield from map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text])


def everything(env):
    return [*env.goals("train"), *env.goals("heldout")]


def play(env, goal, seed, choose):
    """(user, strategy, outcome) of every turn, checking what holds in every dialogue."""
    talk = env.start(goal, seed)
    seen, turns = talk.opening, []
    known = {strategy.id for strategy in env.catalogue(goal)}
    while len(turns) < env.turn_limit(goal):
        grades = talk.relevance()
        assert seen.allowed
        assert known.issuperset(seen.allowed)
        assert tuple(grades) == seen.allowed
        assert list(grades.values()).count(3) == 1
        strategy = choose(grades)
        reply = talk.reference_reply(strategy)
        assert talk.briefing(strategy)
        assert all(value in reply for value in talk.expected(strategy))
        outcome = talk.step(strategy, reply)
        assert (outcome.stop is None) != (outcome.next is None)
        turns.append((seen.user, strategy, outcome))
        if outcome.stop is not None:
            break
        seen = outcome.next
    return turns


def best(grades):
    return max(grades, key=grades.get)


def wander(seed):
    rng = random.Random(seed)
    return lambda grades: rng.choice(list(grades))


# -- the small folder -------------------------------------------------------------------------------------------------


def test_a_human_dialogue_is_replayed_word_for_word_when_the_agent_does_what_the_wizard_did(small):
    goal = next(g for g in everything(small) if g.id == "star-0")
    turns = play(small, goal, 0, best)
    assert [strategy for _, strategy, _ in turns] == [
        "ask_name",
        *("query_check", "table_unavailable"),
        *("query_check", "table_ask_confirm"),
        *("query_book", "table_booked"),
        "goodbye",
    ]
    said = [text for text, strategy, _ in turns if strategy not in ("table_unavailable", "table_ask_confirm")]
    assert said[:2] == ["A table at 1 pm please", "My name is Ann."]
    assert {"Then let us try 9 pm.", "Yes, go ahead.", "Wonderful, Ann will be there."} <= {
        text for text, _, _ in turns
    }
    assert turns[-1][2].stop is StopReason.COMPLETED


def test_goals_hold_what_the_user_knows_and_weights_that_sum_to_one(small):
    goal = everything(small)[0]
    assert set(goal.facts) == {"CustomerName", "Time"}
    assert sum(goal.subgoals.values()) == pytest.approx(1)
    # The time was in the opening: only the name has to be asked for.
    assert [name for name in goal.subgoals if name.startswith("slot:")] == ["slot:CustomerName"]
    assert goal.data["human_success"] is True


def test_the_hidden_user_task_is_not_in_the_context(small):
    for goal in everything(small):
        assert "Secretly" not in goal.context
        assert "https" not in goal.context
        assert goal.context.startswith(
            "Help the user book a table. Task: table book. The tool needs: customer name, time."
        )


def test_the_procedure_masks_queries_reports_and_early_goodbyes(small):
    talk = small.start(everything(small)[0], 0)
    assert set(talk.opening.allowed) == {"hello", "ask_name", "table_ask_time", "out_of_scope"}
    with pytest.raises(SopError, match="query_check"):
        talk.step("query_check", "Let me see.")
    told = talk.step("ask_name", "Your name?").next
    assert "query_check" in told.allowed
    assert "query_book" not in told.allowed
    full = talk.step("query_check", "One moment.").next
    assert "table_unavailable" in full.allowed
    assert {"table_ask_confirm", "table_booked", "goodbye", "query_check"}.isdisjoint(full.allowed)


def test_a_question_already_answered_gets_a_complaint_and_patience_ends(small):
    talk = small.start(everything(small)[0], 0)
    talk.step("ask_name", "Your name?")
    outcomes = [talk.step(s, "Well?") for s in ("table_ask_time", "ask_name", "table_ask_time")]
    assert not any(outcome.on_task for outcome in outcomes)
    assert outcomes[-1].stop is StopReason.USER_LEFT
    with pytest.raises(DialogueError):
        talk.step("ask_name", "Hello?")


def test_closing_early_and_saying_nothing(small):
    goal = everything(small)[0]
    talk = small.start(goal, 0)
    silent = talk.step("ask_name", " ... ")
    assert silent.completed == ()
    assert not silent.on_task
    assert talk.relevance()["ask_name"] == 3  # it was not said: it can be said again
    talk.step("hello", "Hello.")
    assert talk.step("goodbye", "Bye.").stop is StopReason.CLOSED


def test_a_booking_without_a_check_gets_one(tmp_path):
    events = people()[0]["Events"]
    book = next(i for i, event in enumerate(events) if {"RequestType": '"Book"'} in event.get("Constraints", []))
    env = Star.load(write(tmp_path, [variant(1, [{**events[0], "Text": "I am Ann, 9 pm"}, *events[book:]])]))
    turns = play(env, everything(env)[0], 0, best)
    asked = [strategy for _, strategy, _ in turns]
    assert asked == ["query_check", "table_ask_confirm", "query_book", "table_booked", "goodbye"]


def test_what_is_left_out_is_counted(tmp_path):
    env = Star.load(write(tmp_path, [people()[0], variant(3, people()[0]["Events"][:2])]))
    assert env.census["left out: no query result"] == 1
    assert env.census["over one task, happy"] == len(everything(env)) == 1


def test_one_file_per_dialogue_reads_the_same(tmp_path, small):
    env = Star.load(write(tmp_path / "upstream", people(), suffix="json"))
    assert everything(env) == everything(small)


@pytest.mark.parametrize(
    ("field", "broken"),
    [
        ("Events[0].Agent", lambda d: d["Events"][0].pop("Agent")),
        ("Events[0].Text", lambda d: d["Events"][0].update(Text=None)),
        ("Events[3].Constraints", lambda d: d["Events"][3].update(Constraints="Ann")),
        ("DialogueID", lambda d: d.pop("DialogueID")),
        ("Scenario.WizardTask", lambda d: d["Scenario"].pop("WizardTask")),
        ("Scenario.WizardCapabilities[0].Task", lambda d: d["Scenario"]["WizardCapabilities"][0].update(Task="golf")),
    ],
)
def test_a_malformed_record_is_named_by_file_line_and_field(tmp_path, field, broken):
    dialogues = people()[:2]
    broken(dialogues[1])
    with pytest.raises(DataError) as error:
        Star.load(write(tmp_path, dialogues))
    assert f"dialogues_01.jsonl:2:{field}" in str(error.value)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = write(tmp_path, people()[:1])
    with (tmp_path / "dialogues_01.jsonl").open("a") as file:
        file.write('{"DialogueID": 7,\n')
    with pytest.raises(DataError, match=r"dialogues_01\.jsonl:2:column \d+"):
        Star.load(path)


def test_missing_data_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"--gopo\.data"):
        load_environment("star")
    with pytest.raises(DataError, match="no such folder"):
        load_environment("star", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="tasks/"):
        load_environment("star", str(tmp_path))
    same = [people()[0], people()[0]]
    with pytest.raises(DataError, match="twice"):
        load_environment("star", write(tmp_path, same))
    (tmp_path / "dialogues_01.jsonl").write_bytes(b'{"DialogueID": "\xff"}')
    with pytest.raises(DataError, match=r"dialogues_01\.jsonl:1:byte 16: not UTF-8"):
        load_environment("star", str(tmp_path))
    path = Path(write(tmp_path, people()))
    (path / "dialogues_01.jsonl").unlink()
    with pytest.raises(DataError, match="dialogues"):
        load_environment("star", str(path))


@pytest.mark.parametrize(
    ("text", "value", "found"),
    [("at 2pm.", "2 pm", True), ("May 26", "26th", True), ("room 26", "2", False), ("Yes!", "Yes", False)],
)
def test_mentions(text, value, found):
    assert mentions(text, value) is found


def test_constraints_and_long_utterances():
    assert plain('api.is_equal_to("Chicago")') == plain('"Chicago"') == plain("Chicago") == "Chicago"
    assert plain("api.is_at_most(700)") == "700"
    assert len(shorten("word  " * 80).split()) == 60


# -- the real data -----------------------------------------------------------------------------------------------------


def test_the_real_tasks_and_goals(real):
    goals = everything(real)
    assert len({goal.intent for goal in goals}) == 21 + 7  # one task, and several
    assert (len(real.goals("train")), len(real.goals("heldout"))) == (773 + 106, 191 + 34)
    assert len({goal.id for goal in goals}) == len(goals)
    assert real.census["dialogues"] == 1111
    for goal in goals:
        assert sum(goal.subgoals.values()) == pytest.approx(1)
        ids = [strategy.id for strategy in real.catalogue(goal)]
        assert len(ids) == len(set(ids)) <= (44 if "+" in goal.intent else 24)


def test_no_real_user_task_is_in_a_context(real):
    hidden = {f"star-{record['DialogueID']}": record["Scenario"]["UserTask"].strip() for record in real_records()}
    assert all(hidden[goal.id] not in goal.context for goal in everything(real))


def test_the_most_relevant_strategies_reach_every_real_goal(real):
    """All of it but what the tool refused to the human too: no agent gets that."""
    refused = 0
    for goal in everything(real):
        turns = play(real, goal, 0, best)
        left = set(goal.subgoals).difference(*(outcome.completed for _, _, outcome in turns))
        assert all(name.startswith("outcome:") for name in left)
        assert turns[-1][2].stop is (StopReason.CLOSED if left else StopReason.COMPLETED)
        refused += bool(left)
    assert refused == real.census["goals that end without what the user wanted"] == 191


def test_random_walks_end_and_repeat_with_their_seed(real):
    for index, goal in enumerate(everything(real)):
        turns = play(real, goal, index, wander(index))
        if index % 20 == 0:
            assert play(real, goal, index, wander(index)) == turns
            assert all(len(line.split()) <= 60 for text, _, _ in turns for line in text.split("\n"))


def test_replayed_words_are_in_the_data(real):
    events = [event for record in real_records() for event in record["Events"]]
    human = {shorten(event["Text"]) for event in events if event["Agent"] == "User" and "Text" in event}
    for goal in everything(real)[::5]:
        for turns in (play(real, goal, 1, best), play(real, goal, 1, wander(1))):
            own = [t.next.user for _, _, t in turns if {"user:own", "user:generic"}.intersection(t.events) and t.next]
            for text in (turns[0][0], *own):  # over several tasks the user may say some at once, a line each
                assert text in human or human.issuperset(text.split("\n"))


@pytest.mark.parametrize("which", ["small", "real"])
def test_the_checker_accepts_it(which, request):
    # What STAR's own instructions tell the wizard: today's date and clock, where the user is, words of the task.
    told = ["Day", "StartTimeHour", "City", "DepartureLocation", "CodeType", "GuestName"]
    told += ["StartDate", "DepartureTime", "Time", "ArrivalLocation", "PartySize", "QuestionNum"]
    told += [f"{task}.Day" for task in ("weather", "meeting_schedule", "party_plan", "apartment_schedule")]
    check_env(request.getfixturevalue(which), public=told)
