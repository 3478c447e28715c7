"""What was wrong in STAR dialogues that people read turn by turn: hand-derived cases on small desks written here."""

import json

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
