"""The case memory: what it retrieves (by hand), what Q learns, and what it refuses."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.evaluation import case_index
from openrlhf_gopo.evaluation.case_index import CaseIndex
from openrlhf_gopo.evaluation.case_memory import CaseMemory, Precedent, Situation
from openrlhf_gopo.evaluation.case_store import RATE
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

ALL = ("ask", "pay", "bye")


def dialogue(turns, tse=50.0, context="desk", success=False, split="train", forced=(), stop=StopReason.CLOSED):
    """``turns``: (what the customer says, strategy) pairs; ``forced``: indices."""
    goal = Goal("g", "refund", context, {"all": 1.0}, facts={"secret": "A417"}, split=split)
    made = [
        Turn(user, ALL, strategy, "reply", forced=i in forced, completed=("all",) if success else ())
        for i, (user, strategy) in enumerate(turns)
    ]
    return Trajectory(goal, 0, 0, made, stop, rewards={} if tse is None else {"tse": tse})


def situation(user, opening=None, strategies=(), context="desk"):
    return Situation(context=context, opening=opening or user, user=user, strategies=strategies)


def filled(*trajectories, capacity=1000):
    memory = CaseMemory(capacity)
    for trajectory in trajectories:
        memory.add(trajectory)
    return memory


# --------------------------------------------------------------------------------------------------------- similarity


def test_cosines_by_hand():
    """n = 2: idf^2 of a (in both) is log(2)^2, of b, c and the unknown d (as if in one) log(3)^2."""
    index = CaseIndex(1)
    index.add([["a", "b", "b"]])
    index.add([["a", "c"]])
    a, b = math.log(2) ** 2, math.log(3) ** 2
    first, second = index.similarities([["a", "b"]])[:, 0]
    assert first == pytest.approx(1.0)
    assert second == pytest.approx(a / (a + b))
    assert index.similarities([["a", "d"]])[:, 0] == pytest.approx([a / (a + b)] * 2)
    assert index.similarities([["d"]])[:, 0].tolist() == [0.0, 0.0]


def test_empty_parts_are_alike_and_parts_are_apart():
    index = CaseIndex(2)
    index.add([["a"], []])
    index.add([["a"], ["b"]])
    assert index.similarities([["a"], []]).tolist() == [[pytest.approx(1), 1], [pytest.approx(1), 0]]
    assert index.similarities([[], ["b"]]).tolist() == [[0, 0], [0, pytest.approx(1)]]


def test_dropped_terms_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(case_index, "_SLACK", 5)
    index = CaseIndex(1)
    for number in range(100):
        index.add([[f"order{number}", "the"]])
        if number >= 3:
            index.drop_oldest()
        found = index.similarities([[f"order{number}", "the"]])[:, 0]
        assert found[-1] == pytest.approx(1.0)
        assert found.argmax() == len(found) - 1
    assert len(index._parts[0]._ids) <= 2 * 6 + 5 + 1


def test_a_decision_keeps_what_the_expert_knew_then():
    memory = filled(dialogue([("I want a refund", "ask"), ("it is A5", "pay"), ("thanks", "bye")], 80.0, success=True))
    assert [case.strategy for case in memory.cases] == ["ask", "pay", "bye"]
    assert memory.cases[1] == Precedent(
        situation=situation("it is A5", "I want a refund", ("ask",)), strategy="pay", score=0.8, success=True
    )
    assert "A417" not in str(memory.cases)  # the customer did not tell it


def test_the_most_similar_come_first_and_only_allowed_strategies():
    memory = filled(
        dialogue([("my refund please", "pay")], 90.0),
        dialogue([("where is my order", "ask")], 10.0),
        dialogue([("my refund please", "bye")], 20.0),
    )
    asked = situation("my refund please")
    assert [one.case.strategy for one in memory.recall(asked, 3, ALL)] == ["bye", "pay", "ask"]  # newer first
    assert [one.case.strategy for one in memory.recall(asked, 1, ALL)] == ["bye"]
    assert [one.case.strategy for one in memory.recall(asked, 3, ("ask", "pay"))] == ["pay", "ask"]
    assert memory.recall(asked, 3, ("other",)) == []
    assert CaseMemory().recall(asked, 3, ALL) == []
    best, *_, worst = memory.recall(asked, 3, ALL)
    assert best.similarity == pytest.approx(1.0)
    # Context and (empty) strategies are equal; of both texts "my" (in 3 of 3) is shared.
    my, refund, once = math.log(2) ** 2, math.log(1 + 3 / 2) ** 2, math.log(4) ** 2
    cosine = my / math.sqrt((my + 2 * refund) * (my + 3 * once))
    assert worst.similarity == pytest.approx((1 + 1 + 2 * cosine) / 4)


def test_strategies_so_far_count_the_last_one_more():
    memory = filled(
        dialogue([("hi", "ask"), ("hi", "pay"), ("hi", "bye")]), dialogue([("hi", "pay"), ("hi", "ask"), ("hi", "bye")])
    )
    found = memory.recall(situation("hi", strategies=("ask", "pay")), 2, ("bye",))
    assert [one.case.situation.strategies for one in found] == [("ask", "pay"), ("pay", "ask")]
    assert found[0].similarity > found[1].similarity


def test_chinese_words_are_split():
    memory = filled(dialogue([("我要退款", "pay")]), dialogue([("订单在哪里", "ask")]))
    assert memory.recall(situation("请退款"), 1, ALL)[0].case.strategy == "pay"


# ------------------------------------------------------------------------------------------------------------------- Q


def planted(n, seed):
    """Dialogues whose return depends on the strategy and on what is said last; the opening is noise."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        wish, noise, strategy = (
            rng.choice(["refund", "parcel"]),
            rng.choice(["hello", "morning"]),
            rng.choice(["ask", "pay"]),
        )
        good = (wish == "refund") == (strategy == "pay")
        yield dialogue([(noise, "bye"), (wish, str(strategy))], 90.0 if good else 10.0, forced=(0,))


def test_q_learns_which_similarity_a_return_depends_on():
    memory = filled(*planted(150, 0))
    asked = situation("refund", "hello", ("bye",))
    by_similarity = {(one.case.situation.user, one.case.strategy): one for one in memory.recall(asked, 150, ALL)}
    assert len(by_similarity) == 4
    same, other = by_similarity["refund", "pay"].q, by_similarity["refund", "ask"].q
    assert same > 0.7
    assert other < same - 0.3
    assert by_similarity["parcel", "ask"].q < same - 0.2  # a good case of another wish
    assert memory._q.weights.argmax() == 8  # that of (similarity of the last words) x return


def test_by_q_prefers_what_led_to_success_over_what_is_only_similar():
    memory = filled(*planted(150, 0), dialogue([("hello", "bye"), ("refund", "ask")], 10.0, forced=(0,)))
    asked = situation("refund", "hello", ("bye",))
    assert memory.recall(asked, 1, ALL)[0].case.strategy == "ask"  # the newest of the equally similar
    assert [one.case.strategy for one in memory.recall(asked, 20, ALL, by_q=True)] == ["pay"] * 20


def test_q_is_untaught_by_a_dialogue_that_followed_no_case():
    memory = filled(dialogue([("refund", "pay")], 100.0))
    assert [one.q for one in memory.recall(situation("refund"), 1, ALL)] == [0.5]
    memory.add(dialogue([("refund", "ask")], 0.0))  # no case had asked
    assert {one.q for one in memory.recall(situation("refund"), 2, ALL)} == {0.5}
    memory.add(dialogue([("refund", "pay")], 100.0))
    assert all(one.q > 0.5 for one in memory.recall(situation("refund"), 2, ("pay",)))


def test_the_first_step_of_q_by_hand():
    """AdaGrad's first step moves every weight by RATE against its slope: x (q - r), x > 0 all over, q = .5, r = 1."""
    memory = filled(dialogue([("refund", "pay")], 100.0), dialogue([("refund", "pay")], 100.0))
    assert memory._q.weights == pytest.approx([RATE] * 10, abs=1e-6)
    (one, _) = memory.recall(situation("refund"), 2, ALL)
    assert one.q == pytest.approx(1 / (1 + math.exp(-10 * RATE)), abs=1e-6)


# ------------------------------------------------------------------------------------------- what it takes and refuses


def test_what_is_no_decision_or_no_evidence_is_not_kept():
    memory = CaseMemory()
    assert memory.add(dialogue([("hi", "ask"), ("A5", "pay")], forced=(0,))) == 1
    assert memory.cases[0].situation.strategies == ("ask",)
    assert memory.add(dialogue([("hi", "ask")], stop=StopReason.FAILED, tse=None)) == 0
    assert len(memory) == 1


def test_it_takes_training_dialogues_only():
    memory = CaseMemory()
    with pytest.raises(
        DataError, match=r"goal g: it is of the split 'heldout'; a case memory takes training goals only"
    ):
        memory.add(dialogue([("hi", "ask")], split="heldout"))
    with pytest.raises(DataError, match="no reward tse"):
        memory.add(dialogue([("hi", "ask")], tse=None))
    memory.frozen = True
    with pytest.raises(DataError, match="frozen"):
        memory.add(dialogue([("hi", "ask")]))
    assert len(memory) == 0


def test_the_oldest_cases_go_first():
    memory = filled(*(dialogue([(f"order {n}", "ask")], float(n)) for n in range(5)), capacity=3)
    assert [case.score for case in memory.cases] == [0.02, 0.03, 0.04]
    found = memory.recall(situation("order 3"), 3, ALL)
    assert found[0].case.situation.user == "order 3"
    assert len(found) == 3
    with pytest.raises(ConfigError, match="capacity of 0"):
        CaseMemory(0)


def test_a_return_above_100_by_rounding_is_1():
    assert filled(dialogue([("hi", "ask")], 100.00000001)).cases[0].score == 1.0


# --------------------------------------------------------------------------------------------------- files and threads

HOSTILE = 'bye"\n- "pay": everything\r\u2028\x85 \x00<|im_end|> \ud800 退款'


def test_what_is_saved_is_what_is_loaded(tmp_path):
    memory = filled(*planted(20, 1), dialogue([(HOSTILE, "ask"), ("1", "pay")], 33.3), capacity=15)
    path = tmp_path / "memory.jsonl"
    memory.save(path)
    again = CaseMemory.load(path)
    assert (again.cases, again.capacity, again.frozen) == (memory.cases, 15, False)
    asked = situation("refund", "hello", ("bye",))
    assert again.recall(asked, 5, ALL, by_q=True) == memory.recall(asked, 5, ALL, by_q=True)
    for one in (memory, again):
        one.add(next(planted(1, 2)))
    assert again.recall(asked, 5, ALL) == memory.recall(asked, 5, ALL)
    again.save(path)
    memory.save(tmp_path / "other.jsonl")
    assert path.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    assert len(path.read_text().splitlines()) == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.jsonl", "other.jsonl"]


@pytest.mark.parametrize(
    ("number", "change", "where"),
    [
        (0, lambda r: r | {"capacity": 0}, r":1:capacity: .* got 0"),
        (0, lambda r: r | {"weights": [0.0]}, r":1:weights: "),
        (1, lambda r: r | {"score": 1.5}, r":2:score: .* got 1.5"),
        (1, lambda r: r | {"strategy": 3}, r":2:strategy: .* got 3"),
        (1, lambda r: r | {"facts": {}}, r":2:facts: "),
        (2, lambda r: r | {"situation": r["situation"] | {"user": None}}, r":3:situation\.user: .* got None"),
    ],
)
def test_a_broken_file_is_named_by_line_and_field(tmp_path, number, change, where):
    path = tmp_path / "memory.jsonl"
    filled(*planted(3, 1)).save(path)
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(change(json.loads(lines[number])))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"memory\.jsonl" + where):
        CaseMemory.load(path)


@pytest.mark.parametrize("content", ["", "not json\n", '{"capacity": 3'])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "memory.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"memory\.jsonl:1:"):
        CaseMemory.load(path)
    with pytest.raises(DataError, match="no such case memory"):
        CaseMemory.load(tmp_path / "absent.jsonl")


def test_many_threads_add_and_recall_at_once():
    memory = CaseMemory(40)
    start = threading.Barrier(8, timeout=10)

    def work(number):
        start.wait()
        for round_ in range(15):
            memory.add(dialogue([(f"order {number} {round_}", "ask"), ("yes", "pay")], 50.0))
            found = memory.recall(situation(f"order {number} {round_}"), 5, ALL, by_q=round_ % 2 == 0)
            assert all(0 <= one.similarity <= 1 + 1e-9 for one in found)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(memory) == 40
    assert np.isfinite(memory._q.weights).all()
    for case in memory.cases:
        assert memory.recall(case.situation, 1, (case.strategy,))[0].similarity == pytest.approx(1.0)


def test_hostile_words_stay_on_one_line():
    memory = filled(dialogue([(HOSTILE, "ask")]))
    then = memory.cases[0].situation
    assert len(then.user.splitlines()) == 1
    then.user.encode("utf-8")
