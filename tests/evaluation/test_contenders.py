"""Policies by name: what each text means, and what is refused."""

import pytest

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.evaluation.contenders import Half, decoded, parse_contenders, parse_temperatures


def one(text):
    (contender,) = parse_contenders([text])
    return contender


@pytest.mark.parametrize(
    ("text", "name", "kind", "halves", "models"),
    [
        ("a=pair:x/e,x/r", "a", "pair", (("model", "x/e"), ("model", "x/r")), ("x/e", "x/r")),
        ("pair:m,m", "pair:m,m", "pair", (("model", "m"), ("model", "m")), ("m",)),
        (
            "pair:endpoint:q@http://h:1/v1,r",
            "pair:endpoint:q@http://h:1/v1,r",
            "pair",
            (("endpoint", "q@http://h:1/v1"), ("model", "r")),
            ("r",),
        ),
        (
            "big=endpoint:Qwen/Q3@https://h/v1",
            "big",
            "pair",
            (("endpoint", "Qwen/Q3@https://h/v1"),) * 2,
            (),
        ),
        ("ppo = single:runs/ppo", "ppo", "single", (("model", "runs/ppo"),) * 2, ("runs/ppo",)),
        ("random", "random", "pair", (("random", ""),) * 2, ()),
        ("scripted:0.7", "scripted:0.7", "pair", (("scripted", "0.7"),) * 2, ()),
        ("pair:random,scripted", "pair:random,scripted", "pair", (("random", ""), ("scripted", "")), ()),
    ],
)
def test_what_a_policy_is_called_and_made_of(text, name, kind, halves, models):
    found = one(text.replace("ppo = ", "ppo="))
    assert (found.name, found.kind, found.models) == (name, kind, models)
    assert (found.expert, found.responder) == tuple(Half(*half) for half in halves)


def test_experts_with_a_case_memory():
    vote, by_q, planner = (
        one(f"pair:{expert},m").expert
        for expert in ("vote:t.jsonl", "vote_q:t.jsonl", "memento:t.jsonl:endpoint:q@http://h/v1")
    )
    assert (vote, by_q) == (Half("vote", cases="t.jsonl"), Half("vote_q", cases="t.jsonl"))
    assert planner == Half("endpoint", "q@http://h/v1", cases="t.jsonl")
    assert one("pair:memento:t.jsonl:runs/e,runs/r").models == ("runs/e", "runs/r")
    for wrong in ("vote:", "vote:t.jsonl:m", "memento:t.jsonl", "memento::m"):
        with pytest.raises(ConfigError, match="memento:FILE:HALF"):
            one(f"pair:{wrong},m")
    with pytest.raises(ConfigError, match="writes no replies"):
        one("pair:m,vote:t.jsonl")
    named = one("case memory (vote)=pair:vote:t.jsonl,m")
    assert (named.name, named.folder) == ("case memory (vote)", "case_memory_vote")


@pytest.mark.parametrize(
    ("text", "temperatures"),
    [
        ("pair:m,m", [1.0, 0.0]),
        ("single:m", [1.0, 0.0]),
        ("pair:random,m", [1.0, 0.0]),
        ("pair:vote:t.jsonl,scripted", [1.0, 0.0]),
        ("random", [None]),
        ("human", [None]),
        ("pair:memento:t.jsonl:endpoint:q@http://h/v1,scripted", [None]),  # --gopo.llm.temperature is its own
    ],
)
def test_what_samples_is_played_at_every_temperature(text, temperatures):
    found = decoded(parse_contenders([f"x={text}"]), parse_temperatures("1,0"))
    assert [contender.temperature for contender in found] == temperatures
    rows = {"x"} if temperatures == [None] else {"x, sampled", "x, greedy"}
    assert {contender.row for contender in found} == rows
    assert {contender.folder for contender in found} == {"x"}


@pytest.mark.parametrize("text", ["", "1,", "warm", "-1", "1,1", "0.7,0.7000001", "nan", "inf"])
def test_what_is_no_list_of_temperatures_is_refused(text):
    with pytest.raises(ConfigError, match=r"--temperatures .*: give different numbers of 0 or more"):
        parse_temperatures(text)


def test_human_dialogues_have_no_halves():
    assert (one("human").file, one("people=human:logs/a=b.jsonl").file) == (None, "logs/a=b.jsonl")
    assert one("human").expert is None
    assert one("human").models == ()


def test_scripts_have_the_skill_that_was_asked_for_and_make_no_slips():
    assert [one(text).expert.script().skill for text in ("random", "scripted:0.25", "scripted")] == [0.0, 0.25, 1.0]
    assert one("scripted").expert.script().slip == 0.0


@pytest.mark.parametrize("name", ["../up", "a/b", "x y", "\x00", "."])
def test_a_policys_folder_stays_where_it_belongs(name):
    folder = one(f"{name}=random").folder
    assert folder
    assert not set(folder) & set("/\\\x00 ")
    assert folder not in (".", "..")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pair",
        "pair:",
        "pair:a",
        "pair:a,b,c",
        "pair:a,",
        "single",
        "single:",
        "endpoint:",
        "endpoint:model",
        "pair:endpoint:model,b",
        "scripted:much",
        "scripted:1.5",
        "gpt-5",
        "pair:memento:t.jsonl:vote:u.jsonl,m",
        "pair:memento:t.jsonl:scripted,m",
        "endpoint:q@http://me:s3cret@h/v1",
        "endpoint:q@http://h/v1?key=s3cret",
        "x=",
        "x=gpt",
    ],
)
def test_a_text_that_names_no_policy_is_refused(text):
    with pytest.raises(ConfigError, match=r"--policy|skill"):
        parse_contenders([text])


def test_two_policies_cannot_share_a_name_or_a_folder():
    with pytest.raises(ConfigError, match="different names"):
        parse_contenders(["a=random", "a=scripted"])
    with pytest.raises(ConfigError, match="different names"):
        parse_contenders(["a b=random", "a_b=scripted"])
    with pytest.raises(ConfigError, match="at least one"):
        parse_contenders([])
