"""The checker: against an exhaustive walk of small SOPs, one SOP for every finding, and every SOP that is shipped."""

import os
import random
from collections import deque
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openrlhf_gopo.envs.shop_catalogue import PROCEDURE
from openrlhf_gopo.errors import SopError
from openrlhf_gopo.sop import Rule, Sop
from openrlhf_gopo.sop.check import check
from openrlhf_gopo.types import Strategy

STAR = Path(os.environ.get("GOPO_STAR_DATA") or Path(__file__).parents[3] / "shared" / "data" / "star")
STEPS, ENDS, FACTS = ("a", "b", "c", "d"), ("end", "close"), ("x", "y", "z")
CATALOGUE = tuple(Strategy(s, s, s, asks=(f,)) for s, f in zip(STEPS, ("x", "y"), strict=False))
ASKS = {strategy.id: set(strategy.asks) for strategy in CATALOGUE}

# Any small SOP


def some(names):
    return st.lists(st.sampled_from(names), max_size=2, unique=True).map(tuple)


rules = st.builds(
    Rule,
    st.sampled_from((*STEPS, *STEPS, *ENDS)),
    some(FACTS),
    some(FACTS),
    some(STEPS),
    some(STEPS),
    some(STEPS),
    st.sampled_from((None, None, 1, 2, 3)),
    st.booleans(),
)


@st.composite
def sops(draw):
    arguments = {
        "strategies": (*STEPS, *ENDS),
        "rules": tuple(draw(st.lists(rules, max_size=9))),
        "terminal": draw(st.sampled_from((ENDS, ENDS[:1]))),
        "mandatory": draw(some(STEPS)),
    }
    try:
        return Sop(**arguments)
    except SopError:
        # Hypothesis finds its way out of refused SOPs slowly: rules without prerequisites are never refused.
        kept = (Rule(r.strategy, r.requires_facts, (), (), (), r.not_after, r.max_uses) for r in arguments["rules"])
        return Sop(**{**arguments, "rules": tuple(kept)})


def walk_everything(sop, asks):
    """All states of the SOP, each as (history, facts), with the states that may follow it."""
    limit = {s: max([r.max_uses or 1 for r in sop.rules if r.strategy == s], default=1) for s in sop.strategies}

    def key(history, facts):
        counts = tuple(min(history.count(s), limit[s]) for s in sop.strategies)
        return counts, frozenset(facts), history[-1:]

    states, follow = {}, {}
    waiting = deque([((), frozenset())])
    while waiting:
        history, facts = waiting.popleft()
        here = key(history, facts)
        if here in states:
            continue
        states[here] = (history, facts)
        steps = [s for s in sop.free(history, facts) if s not in sop.terminal]
        after = [((*history, s), facts | asks.get(s, set())) for s in steps]
        after += [(history, facts | {fact}) for fact in FACTS if fact not in facts]
        follow[here] = [key(*state) for state in after]
        waiting.extend(after)
    return states, follow


def can_end(sop, states, follow):
    """The states from which a terminal strategy can be reached."""
    good = {here for here, state in states.items() if set(sop.free(*state)) & set(sop.terminal)}
    while more := {here for here in states if here not in good and any(there in good for there in follow[here])}:
        good |= more
    return good


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(sops(), st.booleans())
def test_it_finds_what_an_exhaustive_walk_finds(sop, answered):
    report = check(sop, CATALOGUE, answered=answered)
    assert report.complete
    states, follow = walk_everything(sop, ASKS if answered else {})
    free = {key: sop.free(*state) for key, state in states.items()}
    never = set(sop.strategies) - {strategy for now in free.values() for strategy in now}
    assert never == {f.strategy for f in report.findings if f.kind in ("unreachable", "contradiction")}
    kinds = {finding.kind for finding in report.findings}
    assert ("dead end" in kinds) == (() in free.values())
    good = can_end(sop, states, follow)
    assert ("trap" in kinds) == (0 < len(good) < len(states))


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(sops(), st.randoms(use_true_random=False))
def test_a_walk_in_a_clean_sop_is_never_stuck(sop, rng):
    if any(finding.kind == "dead end" for finding in check(sop, CATALOGUE).findings):
        return
    stroll(sop, ASKS, rng, turns=30)


def stroll(sop, asks, rng, turns):
    history, facts = [], set()
    every = sorted({fact for rule in sop.rules for fact in (*rule.requires_facts, *rule.without_facts)})
    for _ in range(turns):
        facts |= {fact for fact in every if rng.random() < 0.1}
        free = sop.free(history, facts)
        assert free, (history, facts)
        choice = rng.choice(free)
        if choice in sop.terminal:
            return
        history.append(choice)
        facts |= asks.get(choice, set())
