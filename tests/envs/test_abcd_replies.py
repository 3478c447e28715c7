"""What is said in the environment abcd where the human dialogue does not fit as it stands: on changed fixtures."""

import json
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs.abcd import Abcd

FIXTURE = Path(__file__).parent / "abcd_fixture"


@pytest.fixture
def load(tmp_path):
    """Load the fixture after ``change`` was applied to its dialogues, by id, and to its guidelines."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)

    def changed(change):
        files = [tmp_path / name for name in ("dialogues_dev.json", "guidelines.json")]
        talks, guidelines = (json.loads(file.read_text()) for file in files)
        change({talk["convo_id"]: talk for talk in talks}, guidelines)
        for file, value in zip(files, (talks, guidelines), strict=True):
            file.write_text(json.dumps(value))
        return Abcd.load(str(tmp_path))

    return changed


def start(env, number, *strategies):
    """The dialogue about the goal ``number`` after ``strategies``, and what the user says then."""
    goals = [*env.goals("train"), *env.goals("heldout")]
    talk = env.start(next(goal for goal in goals if goal.id == f"abcd-{number}"), 0)
    user = talk.opening.user
    for strategy in strategies:
        user = talk.step(strategy, talk.reference_reply(strategy)).next.user
    return talk, user


def insert(talk, after, *events):
    """Put (speaker, text, action, values) into ``talk`` after the event whose text is ``after``."""
    at = next(i for i, (_, text) in enumerate(talk["original"]) if text == after) + 1
    subflow = talk["delexed"][0]["targets"][0]
    for speaker, text, action, values in reversed(events):
        talk["original"].insert(at, [speaker, text])
        talk["delexed"].insert(at, {"targets": [subflow, "take_action" if action else None, action, values, -1]})


def opening_hours(answer, *later):
    """Change the FAQ's dialogue: the agent tells ``answer`` at the search, ``later`` after the click on the answer."""

    def change(talks, guidelines):
        said = [("agent", text, None, []) for text in later]
        insert(talks[14], "FAQ answer related to opening (question1) was selected.", *said)
        insert(talks[14], "System Action: search opening", ("agent", answer, None, []))
        at = talks[14]["original"].index(["agent", "We open at 8am on all days."])
        del talks[14]["original"][at], talks[14]["delexed"][at]

    return change


def test_the_answer_of_an_faq_is_what_states_a_value_not_the_longest_talk(load):
    talk, _ = start(load(opening_hours("It costs $4.99.", "Right, and it is the same on each and every day.")), 14)
    assert talk.briefing("search-opening").endswith("\nSystem: It costs $4.99.")


def test_an_answer_in_parts_is_told_as_a_whole(load):
    env = load(opening_hours("30 cents for 15 letters.", "20 cents for the next 15."))
    talk, _ = start(env, 14, "search-faq", "search-opening")
    assert talk.reference_reply("select-faq") == "30 cents for 15 letters. 20 cents for the next 15."
    assert talk.briefing("select-faq").endswith("\nSystem: 30 cents for 15 letters. 20 cents for the next 15.")


def test_the_click_on_an_answer_that_was_told_names_no_number_of_the_system(load):
    talk, _ = start(load(opening_hours("We open at 8am.")), 14, "search-faq", "search-opening")
    assert talk.reference_reply("select-faq") == "I hope this answers your question."


def test_a_line_of_the_system_names_what_this_customer_told(load):
    """The human agent entered another level: a slip, or corrected elsewhere."""

    def change(talks, guidelines):
        slip = "Membership level of silver has been noted."
        insert(talks[12], "Purchase validation in progress ...", ("action", slip, "membership", ["silver"]))
        insert(talks[14], "When do you open?", ("action", slip, "membership", ["silver"]))
        talks[14]["scenario"]["personal"]["member_level"] = "silver"

    talk, _ = start(load(change), 12, "ask:membership")
    assert "Entered: gold." in talk.briefing("membership")
    assert talk.reference_reply("membership") == "Membership level of gold has been noted."


def test_of_several_clicks_the_last_one_is_told_also_where_the_customer_spoke_before_the_first(load):
    def change(talks, guidelines):
        first = ("action", "Membership level of 7 has been noted.", "membership", ["7"])
        insert(talks[11], "good", first)

    strategies = ["ask:pull-up-account", "pull-up-account", "ask:validate-purchase", "validate-purchase"]
    talk, user = start(load(change), 11, *strategies, "ask:membership", "reply")
    assert user == "good"
    assert talk.reference_reply("membership") == "Membership level of silver has been noted."


def test_the_agents_thanks_are_not_what_the_system_returned(load):
    def change(talks, guidelines):
        insert(talks[13], "Purchase validation in progress ...", ("agent", "Thank you!", None, []))

    talk, _ = start(load(change), 13, "ask:pull-up-account", "pull-up-account", "ask:validate-purchase")
    assert talk.reference_reply("validate-purchase") == "Thank you!"
    assert "System:" not in talk.briefing("validate-purchase")


def test_who_still_waits_does_not_say_that_this_is_all(load):
    env = load(lambda talks, guidelines: None)
    _, user = start(env, 13, "anything_else")
    assert user == "Sorry, what?"
    everything = ["ask:pull-up-account", "pull-up-account", "ask:validate-purchase", "validate-purchase"]
    _, user = start(env, 13, *everything, "ask:offer-refund", "offer-refund", "anything_else")
    assert user == "nope"


def test_questions_list_what_they_ask_for(load):
    def change(talks, guidelines):
        at = talks[13]["original"].index(["agent", "Thanks. What are your username, email and order ID?"])
        del talks[13]["original"][at], talks[13]["delexed"][at]
        talks[13]["original"][2][1] = "Sure."

    talk, _ = start(load(change), 13)
    assert talk.reference_reply("ask:pull-up-account") == "Could you give me your name, please?"
    asked = talk.reference_reply("ask:validate-purchase")
    assert asked == "Could you give me your order ID, username and email, please?"


def test_descriptions_are_whole_sentences(load):
    def change(talks, guidelines):
        steps = guidelines["Returns"]["subflows"]["Late Return"]["actions"]
        steps[0] |= {"text": "Get the name, then [Pull up Account]", "subtext": ["Full name - first and last"]}
        steps[2] |= {"text": "To check it, you will first need:", "subtext": ["A card <or> a number", "Enter it"]}
        del guidelines["Returns"]["subflows"]["Refund Now"]["actions"][0]

    env = load(change)
    texts = {strategy.id: strategy.description for strategy in env.catalogue(env.goals("heldout")[0])}
    assert texts["pull-up-account"] == "Action. Get the name, then Pull up Account."
    assert texts["membership"] == "Action. To check it, you will first need: A card or a number."
