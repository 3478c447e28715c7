"""The parts of the benchmarks that can be wrong without anyone noticing: the load and the simulation."""

import sys
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "benchmarks"
SYNTHETIC = f"{FOLDER / 'synthetic.py'}:Synthetic"


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the folder by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def test_the_load_has_the_turns_and_words_that_were_asked_for():
    env = load_environment(SYNTHETIC, "turns=4,words=7,goals=3")
    goals = env.goals("train")
    assert len(goals) == 3
    talk = env.start(goals[0], 5)
    seen, strategy = [talk.opening.user], talk.opening.allowed[1]
    while (outcome := talk.step(strategy, "reply")).next is not None:
        seen.append(outcome.next.user)
    assert len(seen) == 4
    assert {len(text.split()) for text in seen} == {7}
    assert len(set(seen)) == 4
    assert outcome.completed == ("talk",)
    assert env.start(goals[0], 5).opening == talk.opening != env.start(goals[0], 6).opening


@pytest.mark.parametrize("data", ["turns=0", "turn=3", "turns=x", "turns"])
def test_a_bad_load_is_refused(data):
    with pytest.raises(ConfigError, match=f"--gopo.data {data}: give positive whole numbers"):
        load_environment(SYNTHETIC, data)


def test_one_dialogue_takes_what_its_parts_take(benchmark):
    scale = benchmark("scale")
    costs = scale.Costs(turn=0.5, dispatch=2.0, receive=3.0, token=0.1, reply=9, turns=4, tail=0.0)
    alone = scale.simulate(costs, engines=1, dialogues=1, k=1)
    assert alone.seconds == pytest.approx(2 + 4 * (0.5 + (1 + 9) * 0.1) + 3)
    assert alone.driver == pytest.approx(5 / alone.seconds)
    assert alone.loop == pytest.approx(2 / alone.seconds)


def test_what_is_slowest_sets_the_pace(benchmark):
    scale = benchmark("scale")
    idle = {"turn": 0.0, "dispatch": 0.0, "receive": 0.0, "token": 0.0, "reply": 9, "turns": 2, "tail": 0.0}
    driver = scale.simulate(scale.Costs(**idle | {"receive": 0.01}), engines=8, dialogues=1000, k=4)
    assert driver.seconds == pytest.approx(10.0)
    assert driver.driver == pytest.approx(1.0)
    loop = scale.simulate(scale.Costs(**idle | {"turn": 0.01}), engines=5, dialogues=1000, k=4)
    assert loop.seconds == pytest.approx(1000 * 2 * 0.01 / 5)
    places = scale.simulate(scale.Costs(**idle | {"token": 0.1}), engines=1, dialogues=2 * scale.SLOTS, k=1)
    assert places.seconds == pytest.approx(2 * 2 * 10 * 0.1)
