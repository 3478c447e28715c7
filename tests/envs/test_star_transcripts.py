"""What was wrong in STAR dialogues that people read turn by turn: hand-derived cases on small desks written here."""

import json

import pytest

from openrlhf_gopo.envs.star import Star

GOODBYE = {"goodbye_1": "Thank you and goodbye."}
QUIZ = {
    "quiz_ask_number": "Which question?",
    "quiz_pose": "{question:s}",
    "quiz_right": "That is right! Another one?",
    "quiz_wrong": "No, it is {answer:s}. Another one?",
}
QUIZ_GRAPH = {"quiz_ask_number": "query", "query": "quiz_pose", "correct": "quiz_right", "incorrect": "quiz_wrong"}


def user(text):
    return {"Agent": "User", "Action": "utter", "Text": text}


def wizard(label, text):
    return {"Agent": "Wizard", "Action": "pick_suggestion", "ActionLabel": label, "Text": text}


def query(item, **values):
    """A query and what the tool returned."""
    constraints = [{slot: f'"{value}"'} for slot, value in values.items()]
    return [
        {"Agent": "Wizard", "Action": "query", "APIName": "any", "Constraints": constraints},
        {"Agent": "KnowledgeBase", "Action": "return_item", "APIName": "any", "Item": {"APIName": "any", **item}},
    ]


BYE = wizard("goodbye_1", "Thank you and goodbye.")


def desk(root, task, said, graph, slots, *dialogues, told="Help the user."):
    """A folder with one ``task``: the wizard can say ``said``, its tool needs ``slots``. A goal per dialogue."""
    for folder in (root / "tasks" / task, root / "apis" / "apis"):
        folder.mkdir(parents=True)
    said = {**said, **GOODBYE}
    replies = {**dict.fromkeys(graph, "state"), **said}
    (root / "tasks" / task / f"{task}.json").write_text(json.dumps({"replies": replies, "graph": graph}))
    (root / "tasks" / task / "responses.json").write_text(json.dumps(said))
    api = {"input": [{"Name": slot} for slot in slots], "required": list(slots)}
    (root / "apis" / "apis" / f"{task}.json").write_text(json.dumps(api))
    scenario = {"Happy": True, "UserTask": "Secret.", "WizardTask": told, "WizardCapabilities": [{"Task": task}]}
    records = [{"DialogueID": i, "Scenario": scenario, "Events": events} for i, events in enumerate(dialogues)]
    (root / "dialogues.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    env = Star.load(str(root))
    goals = {goal.id: goal for split in ("train", "heldout") for goal in env.goals(split)}
    return env, [goals[f"star-{i}"] for i in range(len(dialogues))]


def after(env, goal, *strategies):
    """The dialogue after ``strategies``, each with its reference reply, and the last outcome."""
    talk, outcome = env.start(goal, 0), None
    for strategy in strategies:
        outcome = talk.step(strategy, talk.reference_reply(strategy))
    return talk, outcome


# -- the order of reports ----------------------------------------------------------------------------------------------

ASKED = [user("Question 3 please."), *query({"Question": "Who sings?", "Answer": "Ann"}, QuizNum="3")]
POSED = [wizard("quiz_pose", "Who sings?"), user("Ann!")]
JUDGED = [wizard("quiz_right", "That is right! Another one?"), user("No.")]


def test_an_answer_is_judged_only_after_the_question_was_posed(tmp_path):
    env, goals = desk(tmp_path, "quiz", QUIZ, QUIZ_GRAPH, ["QuizNum"], [*ASKED, *POSED, *JUDGED, BYE])
    talk, asked = after(env, goals[0], "query")
    assert "quiz_pose" in asked.next.allowed
    assert {"quiz_right", "quiz_wrong"}.isdisjoint(asked.next.allowed)
    posed = talk.step("quiz_pose", "Who sings?")
    assert posed.next.user == "Ann!"
    assert {"quiz_right", "quiz_wrong"} <= set(posed.next.allowed)


def test_reports_that_a_human_gave_the_other_way_round_leave_something_to_say(tmp_path):
    said = {**QUIZ, "quiz_hint": "It starts with {answer:s}."}
    hinted = [wizard("quiz_hint", "It starts with Ann."), user("Hm.")]
    env, goals = desk(tmp_path, "quiz", said, QUIZ_GRAPH, ["QuizNum"], *[[*ASKED, *hinted, *POSED, BYE]] * 3)
    talk, outcome = after(env, goals[0], "query", "quiz_pose")
    assert outcome.completed == ("report:1:quiz_pose",)
    assert 3 in talk.relevance().values()


FLATS = {
    "flat_ask_rooms": "How many rooms?",
    "flat_tell": "There is one on level {level:d}.",
    "flat_ask_search_more": "Would you like to search for more?",
}
FLATS_GRAPH = {"flat_ask_rooms": "query", "query": "flat_tell"}
FLAT_FOUND = [user("A flat with 3 rooms."), *query({"Level": 7}, Rooms="3")]
MORE = [wizard("flat_ask_search_more", "Would you like to search for more?"), user("No.")]


def test_asking_whether_to_go_on_does_not_report_the_result(tmp_path):
    """The wizard told it in words of their own."""
    own_words = [wizard("", "Seventh floor, if you do not mind the stairs."), user("Nice.")]
    env, goals = desk(tmp_path, "flat", FLATS, FLATS_GRAPH, ["Rooms"], *[[*FLAT_FOUND, *own_words, *MORE, BYE]] * 3)
    assert "flat_ask_search_more" in after(env, goals[0], "query")[1].next.allowed
    assert after(env, goals[0], "query", "flat_ask_search_more")[1].completed == ()
    assert after(env, goals[0], "query", "flat_tell")[1].completed == ("report:1", "outcome:check")


# -- what the agent reads and says -------------------------------------------------------------------------------------

RIDES = {
    "ride_ask_goal": "Where to?",
    "ride_ask_confirm": "A ride with {driver_name:s} for {price:d} credits. Shall I book it?",
    "ride_booked": "Booked, the plate is '{license_plate:s}'.",
}
RIDES_GRAPH = {"ride_ask_goal": "query_check", "available": "ride_ask_confirm", "query_success": "ride_booked"}
RIDES_GRAPH |= {"yes": "query_book", "query_check": "available", "query_book": "query_success"}
RIDE = {"Goal": "Airport", "CarModel": "Honda", "DriverName": "Ella", "LicensePlate": "019 EAS", "Price": 12}


def rides(root):
    """A ride that is checked, booked, and booked anew for another goal and car."""
    events = [user("To the airport."), *query(RIDE, Goal="airport", RequestType="Check")]
    events += [wizard("ride_ask_confirm", "A ride with Ella for 12 credits. Shall I book it?"), user("Yes.")]
    events += query({"Message": "Ride booked."}, Goal="airport", RequestType="Book")
    events += [wizard("", "It is all set for you now."), user("To the station, in a BMW.")]
    events += query({"Message": "Ride booked."}, Goal="station", CarModel="BMW", RequestType="Book")
    events += [wizard("", "It is all set for you now."), user("Thanks."), BYE]
    env, goals = desk(root, "ride_book", RIDES, RIDES_GRAPH, ["Goal", "CarModel", "RequestType"], events)
    return env, goals[0]


def test_a_booking_tells_what_its_check_found(tmp_path):
    checked = ("query_check", "ride_ask_confirm", "query_book")
    talk, _ = after(*rides(tmp_path), *checked)
    assert talk.reference_reply("ride_booked") == "Booked, the plate is '019 EAS'."
    assert "LicensePlate: 019 EAS; Price: 12; Message: Ride booked." in talk.briefing("ride_booked")
    assert "Honda" in talk.briefing("ride_booked")
    for strategy in ("ride_booked", "query_book"):
        talk.step(strategy, talk.reference_reply(strategy))
    briefing = talk.briefing("ride_booked")
    assert "Goal: station; CarModel: BMW; DriverName: Ella" in briefing


def test_a_booking_is_not_announced_as_a_check(tmp_path):
    talk, _ = after(*rides(tmp_path), "query_check", "ride_ask_confirm")
    assert "booking" in talk.briefing("query_book")
    assert talk.reference_reply("query_book") == "Sure, I will book that for you."


def filled(root, template, item):
    """The reference reply, the strings expected of it, and the briefing of a report over ``item``."""
    said = {"desk_ask_rooms": "How many?", "desk_tell": template}
    graph = {"desk_ask_rooms": "query", "query": "desk_tell"}
    own_words = [wizard("", "Look at this one, it is just what you want."), user("Ok.")]
    env, goals = desk(root, "desk", said, graph, ["Rooms"], [user("3"), *query(item, Rooms="3"), *own_words, BYE])
    talk, _ = after(env, goals[0], "query")
    return talk.reference_reply("desk_tell"), talk.expected("desk_tell"), talk.briefing("desk_tell")


@pytest.mark.parametrize(
    ("template", "item", "reply", "expected"),
    [
        ("In {minutes_till_pickup:d} minutes.", {"RideWait": "10 minutes away"}, "In 10 minutes.", ("10",)),
        ("Orders: {instructions:s}.", {"Message": "Sleep well."}, "Orders: Sleep well.", ("Sleep well.",)),
        ("Try the {name:s}!", {"Name": "The Oak"}, "Try The Oak!", ("The Oak",)),
        ("It {has_balcony:s}.", {"HasBalcony": True}, "It has a balcony.", ()),
        ("It {has_elevator:s}.", {"HasElevator": False}, "It does not have an elevator.", ()),
        ("Near {pois:s}.", {"NearbyPOIs": ["Gym", "Museum"]}, "Near Gym, Museum.", ()),
    ],
)
def test_values_fit_into_the_sentences_of_templates(tmp_path, template, item, reply, expected):
    assert filled(tmp_path, template, item)[:2] == (reply, expected)


def test_the_briefing_lists_all_that_is_nearby_and_one_step_of_the_way(tmp_path):
    item = {"NearbyPOIs": ["Gym", "Museum"], "WalkingInstructions": ["Turn left.", "Go on."]}
    _, _, briefing = filled(tmp_path, "{pois:s}: {simple_instruction:s}", item)
    assert briefing.endswith("Tool result: NearbyPOIs: Gym, Museum; WalkingInstructions: Turn left.")


def test_a_check_that_the_procedure_adds_has_not_found_nothing(tmp_path):
    events = [user("To the airport."), *query({"Message": "Ride booked."}, Goal="airport", RequestType="Book")]
    events += [wizard("", "It is all set for you now."), user("Thanks."), BYE]
    env, goals = desk(tmp_path, "ride_book", RIDES, RIDES_GRAPH, ["Goal", "RequestType"], events)
    talk, _ = after(env, goals[0], "query_check")
    assert talk.briefing("ride_ask_confirm").endswith("Tool result: Goal: airport")


@pytest.mark.parametrize("told", ["Schedule a meeting!", "Book a room.", "Book a room"])
def test_the_context_keeps_one_full_stop(tmp_path, told):
    _, goals = desk(tmp_path, "flat", FLATS, FLATS_GRAPH, ["Rooms"], [*FLAT_FOUND, *MORE, BYE], told=told)
    assert goals[0].context.startswith(f"{told.rstrip('.')}{'' if told.endswith('!') else '.'} Task: flat.")


# -- what the user says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "rest", "own"),
    [
        ("Perfect, that will do.", [*MORE, BYE], True),
        ("Go on.", [wizard("flat_tell", "There is one on level 9."), user("Fine."), BYE], False),
        ("Nice. Has it a balcony?", [BYE], False),
    ],
    ids=["content", "the wizard told more", "a question"],
)
def test_when_all_is_done_the_user_does_not_ask_for_more(tmp_path, words, rest, own):
    told = [wizard("flat_tell", "There is one on level 7."), user(words)]
    env, goals = desk(tmp_path, "flat", FLATS, FLATS_GRAPH, ["Rooms"], [*FLAT_FOUND, *told, *rest])
    talk, outcome = after(env, goals[0], "query", "flat_tell")
    assert talk.relevance()["goodbye"] == 3
    assert (outcome.next.user == words) is own


def test_a_new_wish_is_told_with_all_its_values(tmp_path):
    """The wizard asked back in between, which the policy does not: the slot is known."""
    said = {"meet_ask_start_time": "When?", "meet_ask_end_time": "Until?", "meet_full": "No, they are busy."}
    graph = {"meet_ask_start_time": "query", "query": "meet_full"}
    full, busy = {"Message": "conflicting"}, wizard("meet_full", "No, they are busy.")
    events = [user("From 1 pm to 2 pm."), *query(full, StartTimeHour="1 pm", EndTimeHour="2 pm"), busy]
    events += [user("Hm, 3 pm?"), wizard("meet_ask_end_time", "Until?"), user("5 pm")]
    events += [*query(full, StartTimeHour="3 pm", EndTimeHour="5 pm"), busy, user("Never mind."), BYE]
    env, goals = desk(tmp_path, "meet", said, graph, ["StartTimeHour", "EndTimeHour"], events)
    _, outcome = after(env, goals[0], "query", "meet_full")
    assert outcome.next.user == "Hm, 3 pm?\n5 pm"


def test_a_user_does_not_name_what_another_goal_is_about(tmp_path):
    """Somebody spoke of a value that is another dialogue's, and was no part of their own query."""
    said = {"doc_ask_name": "Which doctor?", "doc_tell": "They say: rest.", "doc_note": "I have made a note."}
    graph = {"doc_ask_name": "query", "query": "doc_tell"}

    def visit(doctor, *noted):
        told = [wizard("doc_tell", "They say: rest."), user("Thanks.")]
        return [user(f"I saw {doctor}."), *noted, *query({"Message": "rest"}, Name=doctor), *told, BYE]

    note = wizard("doc_note", "I have made a note.")
    quiet = [visit("Dr. Elm"), *[visit("Dr. May")] * 5]
    noted = [visit("Dr. Oak", note, user(words)) for words in ["Before it was Dr. May.", "Good."] * 5]
    env, goals = desk(tmp_path, "doc", said, graph, ["Name"], *quiet, *noted)
    words = {env.start(goals[0], seed).step("doc_note", "Noted.").next.user for seed in range(20)}
    assert words == {"Good."}
