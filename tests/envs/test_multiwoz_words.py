"""What the user of multiwoz tells by their words, and the words they get where their own do not do."""

import json
import shutil
from pathlib import Path

import pytest

from openrlhf_gopo.envs.multiwoz import Multiwoz
from openrlhf_gopo.envs.multiwoz_db import chosen, says
from openrlhf_gopo.envs.multiwoz_texts import heard, phrase, request

FIXTURE = Path(__file__).parent / "multiwoz_fixture"
OFFER = {"Restaurant-Recommend": [["Name", "the blue duck"]]}
BYE = {"general-bye": [["none", "none"]]}


@pytest.fixture
def load(tmp_path):
    """An environment on the fixture's database and the dialogues given by id: (goal, [(text, acts), ...])."""
    shutil.copytree(FIXTURE / "db", tmp_path / "db")

    def load(**dialogues):
        data = {
            name: {"goal": goal, "log": [{"text": text, "dialog_act": acts} for text, acts in log]}
            for name, (goal, log) in dialogues.items()
        }
        (tmp_path / "val.json").write_text(json.dumps(data))
        return Multiwoz.load(str(tmp_path))

    return load


def start(env, name="A"):
    return env.start(next(g for s in ("train", "heldout") for g in env.goals(s) if g.id == f"multiwoz-{name}"), 0)


def restaurant(**goal):
    return {"restaurant": {"info": {"food": "thai", "area": "north"}, **goal}}


def test_says_knows_spellings_and_whole_words():
    assert says("Something cheaper in the center ?", "cheap")
    assert says("Something cheaper in the center ?", "centre")
    assert says("a guest house", "guesthouse")
    assert not says("That would be lovely .", "ely")
    assert not says("Yes , please .", "yes")


def test_yes_does_not_tell_what_the_goal_has_a_yes_for(load):
    goal = {"hotel": {"info": {"area": "north", "internet": "yes"}}}
    log = [("Yes , an inn in the north .", {"Hotel-Inform": [["Area", "north"]]}), ("Ok .", BYE)]
    talk = start(load(A=(goal, log)))
    assert "Database: 1 of hotel for area north." in talk.briefing("offer")
    assert talk.relevance()["ask:internet"] == 3


def test_a_value_that_the_goal_does_not_have_tells_nothing_and_is_not_replayed(load):
    log = [
        ("I want to eat thai food .", {"Restaurant-Inform": [["Food", "thai"]]}),
        ("Where ?", {"Restaurant-Request": [["Area", "?"]]}),
        ("In the south .", {"Restaurant-Inform": [["Area", "south"]]}),
        ("The blue duck .", OFFER),
    ]
    talk = start(load(A=(restaurant(), log)))
    assert talk.step("ask:area", "Where ?").next.user == "north"
    log[0] = ("I want greek food in the north .", {"Restaurant-Inform": [["Food", "greek"], ["Area", "north"]]})
    talk = start(load(A=(restaurant(), log)))
    assert "for area north." in talk.briefing("offer")
    assert talk.step("ask:food", "What food ?").next.user == "thai"


def test_a_search_that_the_user_asked_for_and_that_fails_is_played_whatever_the_human_system_did(load):
    log = [
        ("I want greek food in the north .", {"Restaurant-Inform": [["Food", "greek"], ["Area", "north"]]}),
        ("The blue duck ?", OFFER),
    ]
    goal = restaurant(fail_info={"food": "greek", "area": "north"})
    talk = start(load(A=(goal, log)))
    assert "Database: 0 of restaurant for type of food greek, area north." in talk.briefing("no_offer")
    assert talk.step("no_offer", "There is none.").next.user == "How about thai?"
    assert talk.expected("offer") == ("the blue duck",)


def test_the_one_that_the_user_named_is_presented():
    rows = [{"name": "worth house"}, {"name": "old inn"}, {"name": "warkworth house"}]
    assert chosen(rows, "I take the Old Inn .", "We have worth house and old inn .") == rows[1]
    assert chosen(rows, "Sounds good .", "Warkworth house is nice .") == rows[2]


def test_words_that_tell_what_cannot_be_replaced_are_not_lent_to_others(load):
    goal = restaurant(book={"people": "2"})
    log = [
        ("I want thai food in the north .", {"Restaurant-Inform": [["Food", "thai"], ["Area", "north"]]}),
        ("Any price range ?", {"Restaurant-Request": [["Price", "?"]]}),
        ("", {}),
        ("The blue duck .", OFFER),
    ]
    stray = [*log[:2], ("Only with a garden .", {"Restaurant-Inform": [["Name", "garden"]]}), log[3]]
    fine = [*log[:2], ("I do n't mind .", {"Restaurant-Inform": [["Price", "dontcare"]]}), log[3]]
    for other, answers in ((stray, {"Sorry, what?"}), (fine, {"I do n't mind ."})):
        env = load(**{f"B{i}": (goal, other) for i in range(9)}, A=(goal, log))
        assert {start(env).step("ask:pricerange", "What price ?").next.user} == answers


def test_a_question_is_answered_as_the_goal_says_before_its_turn_and_in_its_domain_only(load):
    goal = {**restaurant(book={"people": "2"}), "hotel": {"info": {"parking": "no"}}}
    acts = {"Restaurant-Inform": [["Food", "thai"]], "Hotel-Inform": [["Area", "west"]]}
    talk = start(load(A=(goal, [("I want thai food , and an inn .", acts), ("The blue duck .", OFFER)])))
    assert talk.step("ask:people", "How many ?").next.user == "2"
    assert talk.step("ask:parking", "With parking ?").next.user == "Sorry, what?"


def test_words_about_what_is_done_are_left_out(load):
    goal = {**restaurant(reqt=["phone"]), "taxi": {"info": {"leaveAt": "10:15"}}}
    ask = {"Restaurant-Request": [["Phone", "?"]]}
    log = [
        ("I want thai food in the north .", {"Restaurant-Inform": [["Food", "thai"], ["Area", "north"]]}),
        ("The blue duck .", OFFER),
        ("The phone number ?", ask),
        ("01111 .", {"Restaurant-Inform": [["Phone", "01111"]]}),
        ("And what is its name again ?", {**ask, "Restaurant-Inform": [["Name", "duck"]]}),
        ("The blue duck .", OFFER),
        ("A taxi at 10:15 .", {"Taxi-Inform": [["Leave", "10:15"]]}),
        ("A blue audi will come .", {"Taxi-Inform": [["Car", "blue audi"], ["Phone", "0700"]]}),
    ]
    talk = start(load(A=(goal, log)))
    talk.step("offer", "The blue duck.")
    assert talk.step("inform", "It is 01111.").next.user == "A taxi at 10:15 ."


def test_the_wording_of_wishes_and_questions():
    assert phrase("parking", "no") == "one without parking"
    assert [phrase("stay", n) for n in ("1", "2")] == ["1 night", "2 nights"]
    assert heard("Could you try one night ?", "stay", "1")
    assert heard("The same with free parking ?", "parking", "yes")
    assert not heard("Ok .", "pricerange", "moderate")
    assert request(["phone"]) == "Could you tell me the phone number?"
    assert request(["type", "area", "parking"]) == "Could you tell me the type, the area and if it has parking?"


def test_the_user_s_values_are_told_by_the_names_of_the_facts(load):
    log = [("Thai food .", {"Restaurant-Inform": [["Food", "thai"]]}), ("The blue duck .", OFFER)]
    env = load(A=(restaurant(), log))
    goal = next(g for s in ("train", "heldout") for g in env.goals(s))
    assert env.case(goal).told >= {"restaurant.food"}
    assert goal.facts == {"restaurant.food": "thai", "restaurant.area": "north"}
