"""The SOP engine: what is allowed when, and which SOPs are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_gopo.errors import SopError
from openrlhf_gopo.sop import Part, Rule, Sop

DESK = ("greet", "ask_id", "look_up", "refund", "close")


def allowed(rule: Rule, history=(), facts=()):
    return rule.strategy in Sop(DESK, rules=(rule,)).allowed(list(history), set(facts))


def test_without_rules_everything_is_allowed_in_catalogue_order():
    assert Sop(DESK).allowed([], set()) == DESK


@pytest.mark.parametrize(
    ("rule", "history", "facts", "expected"),
    [
        (Rule("refund", requires_facts=("id", "date")), (), {"id"}, False),
        (Rule("refund", requires_facts=("id", "date")), (), {"id", "date"}, True),
        (Rule("ask_id", without_facts=("id",)), (), set(), True),
        (Rule("ask_id", without_facts=("id",)), (), {"id"}, False),
        (Rule("refund", after=("greet", "look_up")), ("greet",), set(), False),
        (Rule("refund", after=("greet", "look_up")), ("look_up", "greet"), set(), True),
        (Rule("refund", after_any=("greet", "look_up")), ("ask_id",), set(), False),
        (Rule("refund", after_any=("greet", "look_up")), ("look_up",), set(), True),
        (Rule("greet", not_after=("look_up",)), ("ask_id",), set(), True),
        (Rule("greet", not_after=("look_up",)), ("look_up", "ask_id"), set(), False),
        (Rule("greet", max_uses=2), ("greet",), set(), True),
        (Rule("greet", max_uses=2), ("greet", "ask_id", "greet"), set(), False),
        (Rule("greet", no_repeat=True), ("greet",), set(), False),
        (Rule("greet", no_repeat=True), ("greet", "ask_id"), set(), True),
    ],
)
def test_each_condition(rule, history, facts, expected):
    assert allowed(rule, history, facts) is expected


def test_several_rules_on_one_strategy_must_all_hold():
    sop = Sop(DESK, rules=(Rule("refund", requires_facts=("id",)), Rule("refund", after=("look_up",))))
    assert "refund" not in sop.allowed(["look_up"], set())
    assert "refund" not in sop.allowed([], {"id"})
    assert "refund" in sop.allowed(["look_up"], {"id"})


def test_a_terminal_strategy_waits_for_every_mandatory_step():
    sop = Sop(DESK, terminal=("close",), mandatory=("ask_id", "look_up"))
    assert "close" not in sop.allowed(["ask_id"], set())
    assert "close" in sop.allowed(["ask_id", "look_up"], set())
    assert "mandatory look_up" in sop.why_not("close", ["ask_id"], set())


def test_a_dialogue_that_ran_out_of_strategies_can_be_closed():
    once = tuple(Rule(strategy, max_uses=1) for strategy in ("a", "b"))
    sop = Sop(("a", "b", "end"), rules=(*once, Rule("end", requires_facts=("id",))), terminal=("end",))
    assert sop.allowed(["a"], set()) == ("b",)
    assert sop.allowed(["a", "b"], set()) == ("end",)
    assert sop.why_not("end", ["a", "b"], set()) is None


def test_a_part_offers_its_strategies_and_adds_its_rules():
    sop = Sop(
        DESK,
        rules=(Rule("close", after_any=("greet", "refund")), Rule("refund", max_uses=1)),
        terminal=("close",),
        parts=(
            Part(
                "orders", ("ask_id", "look_up", "refund", "close"), (Rule("refund", after=("look_up",)),), ("look_up",)
            ),
            Part("chat", ("greet", "close")),
        ),
    )
    orders = sop.part("orders")
    assert orders.strategies == ("ask_id", "look_up", "refund", "close")
    assert orders.allowed(["look_up"], set()) == ("ask_id", "look_up", "refund")  # close waits for the refund
    assert orders.allowed(["look_up", "refund"], set()) == ("ask_id", "look_up", "close")
    assert sop.part("chat").allowed(["greet"], set()) == ("greet", "close")
    with pytest.raises(SopError, match="no part 'returns'; it has orders, chat"):
        sop.part("returns")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategies": ()}, "no strategies"),
        ({"strategies": ("a", "a")}, "'a' is listed twice"),
        ({"rules": (Rule("pay"),)}, "unknown strategy 'pay'; known: greet"),
        ({"rules": (Rule("refund", after=("pay",)),)}, "rule on 'refund', after, names the unknown strategy 'pay'"),
        ({"rules": (Rule("refund", after_any=("pay",)),)}, "after_any, names the unknown strategy 'pay'"),
        ({"rules": (Rule("refund", not_after=("pay",)),)}, "not_after, names the unknown strategy 'pay'"),
        ({"rules": (Rule("refund", requires_facts=("mood",)),), "facts": ("id",)}, "unknown fact 'mood'; known: id"),
        ({"rules": (Rule("refund", after=("greet",), not_after=("greet",)),)}, "'greet' in both after and not_after"),
        ({"rules": (Rule("refund", max_uses=0),)}, "max_uses=0"),
        ({"rules": (Rule("refund", after=("look_up",)), Rule("look_up", after=("refund",)))}, "can never be allowed"),
        ({"rules": (Rule("refund", after=("close",)),), "terminal": ("close",)}, "'refund' can never be allowed"),
        ({"terminal": ("bye",)}, "terminal names the unknown strategy 'bye'"),
        ({"mandatory": ("bye",)}, "mandatory names the unknown strategy 'bye'"),
        ({"terminal": ("close",), "mandatory": ("close",)}, "'close' is terminal and cannot be mandatory"),
        ({"rules": tuple(Rule(s, max_uses=1) for s in DESK)}, "could get stuck"),
        ({"parts": (Part("a"), Part("a"))}, "part 'a' is listed twice"),
        ({"parts": (Part("a", ("pay",)),)}, "part 'a' names the unknown strategy 'pay'"),
        (
            {"parts": (Part("a", ("greet",), (Rule("refund"),)),)},
            "part 'a': a rule names the unknown strategy 'refund'",
        ),
    ],
)
def test_an_sop_that_cannot_work_is_refused_with_a_reason(arguments, message):
    with pytest.raises(SopError, match=message):
        Sop(**{"strategies": DESK, **arguments})


def test_an_impossible_history_is_refused():
    sop = Sop(DESK, terminal=("close",))
    with pytest.raises(SopError, match="history names the unknown strategy 'pay'"):
        sop.allowed(["pay"], set())
    with pytest.raises(SopError, match="'close' was used; the dialogue is over"):
        sop.allowed(["close", "greet"], set())


def test_why_not_gives_the_reason():
    sop = Sop(DESK, rules=(Rule("refund", requires_facts=("id",)), Rule("greet", no_repeat=True)))
    assert sop.why_not("refund", [], set()) == "needs the facts id"
    assert sop.why_not("greet", ["greet"], set()) == "may not be used twice in a row"
    assert sop.why_not("ask_id", [], set()) is None
    assert "not a strategy" in sop.why_not("pay", [], set())


names = st.sampled_from(DESK[:4])
some = st.lists(names, max_size=2, unique=True).map(tuple)
facts = st.lists(st.sampled_from(("id", "date")), max_size=2, unique=True).map(tuple)
rules = st.builds(Rule, names, facts, facts, some, some, some, st.one_of(st.none(), st.integers(1, 2)), st.booleans())


@given(st.lists(rules, max_size=5), some, st.randoms(use_true_random=False))
def test_a_checked_sop_always_allows_something_and_only_what_its_rules_allow(drawn, mandatory, rng):
    try:
        sop = Sop(DESK, tuple(drawn), terminal=("close",), mandatory=mandatory)
    except SopError:
        return
    history, known = [], set()
    for _ in range(8):
        now = sop.allowed(history, known)
        assert now
        assert list(now) == [s for s in DESK if s in now]
        if now != ("close",):
            assert all(rule.broken(history, known) is None for rule in drawn if rule.strategy in now)
        choice = rng.choice(now)
        if choice == "close":
            break
        history.append(choice)
        known |= {fact for fact in ("id", "date") if rng.random() < 0.3}
