"""Memento's case bank: which dialogues are shown, what Q learns from those that were, and its file."""

import pytest

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.case_bank import SHOWN, CaseBank
from openrlhf_gopo.evaluation.case_memory import CaseMemory
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn


def dialogue(said, *, success, context="desk", strategies=("ask",), split="train", stop=StopReason.CLOSED):
    goal = Goal("g", "refund", context, {"all": 1.0}, split=split)
    done = ("all",) if success else ()
    turns = [Turn(said, ("ask", "pay"), strategy, "reply", completed=done) for strategy in strategies]
    return Trajectory(goal, 0, 0, turns, stop, rewards={"tse": 50.0})


def filled(*dialogues):
    bank = CaseBank()
    for one in dialogues:
        bank.add(one)
    return bank


def shown(bank, said, context="desk"):
    return [(case.opening, case.success) for case in bank.recall(context, said)]


def test_a_case_is_a_whole_dialogue_and_the_most_similar_come_first():
    bank = filled(
        dialogue("a refund", success=False, strategies=("ask", "pay", "ask")),
        dialogue("the parcel", success=True),
        dialogue("a refund", success=True, context="counter"),
    )
    assert shown(bank, "a refund") == [("a refund", False), ("a refund", True), ("the parcel", True)]
    assert bank.recall("desk", "a refund")[0].strategies == ("ask", "pay", "ask")
    assert CaseBank().recall("desk", "a refund") == []
    many = filled(*(dialogue(f"order {n}", success=True) for n in range(9)))
    assert len(many.recall("desk", "order")) == SHOWN


def test_q_learns_from_what_was_shown_that_following_good_cases_helps():
    """Where the shown cases are good the dialogue succeeds, where they are bad it does not."""
    bank = filled(dialogue("a refund", success=True), dialogue("the parcel", success=False))
    for _ in range(30):
        (good, bad) = (bank.recall("desk", said) for said in ("a refund", "the parcel"))
        assert len(good) == len(bad) >= 2
        bank.grow([dialogue("a refund", success=True), dialogue("the parcel", success=False)])
    near = [("lost parcel", success) for success in (True, False)]
    mixed = filled(*(dialogue(said, success=success) for said, success in near))
    assert shown(mixed, "lost parcel") == [("lost parcel", False), ("lost parcel", True)]  # as similar: the newer
    mixed._q = bank._q
    assert shown(mixed, "lost parcel") == [("lost parcel", True), ("lost parcel", False)]


def test_what_was_not_shown_teaches_nothing_and_a_round_is_read_before_it_is_learned():
    bank = CaseBank()
    bank.grow([dialogue("a refund", success=True)] * 3)  # an empty bank shows nothing
    assert not bank._q.weights.any()
    assert len(bank) == 3
    one, other = filled(dialogue("hi", success=True)), filled(dialogue("hi", success=True))
    one.grow([dialogue("hi", success=False), dialogue("hi", success=True)])
    for success in (False, True):
        other.grow([dialogue("hi", success=success)])
    assert one._q.weights.tolist() != other._q.weights.tolist()


def test_only_training_dialogues_that_did_not_fail_are_evidence():
    bank = filled(dialogue("hi", success=False, stop=StopReason.FAILED))
    assert len(bank) == 0
    with pytest.raises(DataError, match="takes training goals only"):
        bank.grow([dialogue("hi", success=True, split="heldout")])
    bank.frozen = True
    with pytest.raises(DataError, match="frozen"):
        bank.add(dialogue("hi", success=True))


def test_the_oldest_go_beyond_the_capacity():
    bank = CaseBank(capacity=2)
    for said in ("one", "two", "three"):
        bank.add(dialogue(said, success=True))
    assert {opening for opening, _ in shown(bank, "one")} == {"two", "three"}


def test_it_is_saved_and_read_whole(tmp_path):
    bank = filled(*(dialogue(f"order {n}\n\ud800", success=n % 2 == 0) for n in range(6)))
    bank.grow([dialogue("order 3", success=True)])
    bank.save(tmp_path / "cases.jsonl")
    again = CaseBank.load(tmp_path / "cases.jsonl")
    assert shown(again, "order 3") == shown(bank, "order 3")
    again.save(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "cases.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"cases.jsonl:1:weights: 6 numbers, not 10; it is another memory's file"):
        CaseMemory.load(tmp_path / "cases.jsonl")
    (tmp_path / "cases.jsonl").write_bytes((tmp_path / "cases.jsonl").read_bytes() + b'{"context": 1}\n')
    with pytest.raises(DataError, match=r"cases.jsonl:9:context"):
        CaseBank.load(tmp_path / "cases.jsonl")
