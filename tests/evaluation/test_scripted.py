import math
import random
from collections import Counter
from itertools import islice

import pytest

from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, demonstrations, play
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason, Strategy

ALLOWED = ("ask", "solve", "close")


class ToyDialogue(Dialogue):
    """``ask`` (forced) opens; then ``solve`` completes the goal, ``close`` ends, ``ask`` goes on."""

    def __init__(self, goal, seed):
        self.goal, self.step_number = goal, 0
        self.opening = Observation(f"hello {seed}", ("ask",))

    def briefing(self, strategy):
        return f"briefing {self.step_number} {strategy}"

    def expected(self, strategy):
        return (f"fact {self.step_number} {strategy}",)

    def relevance(self):
        return {"ask": 3} if self.step_number == 0 else {"ask": 1, "solve": 3, "close": 3}

    def reference_reply(self, strategy):
        return f"reply {strategy}: fact {self.step_number} {strategy}"

    def step(self, strategy, reply):
        if self.goal.id == "broken":
            raise RuntimeError("database gone")
        if self.goal.id == "endless" and self.step_number:
            return Outcome()
        self.step_number += 1
        if strategy == "solve":
            return Outcome(("thanks",), ("solve",), 1.0, True, stop=StopReason.COMPLETED)
        if strategy == "close":
            return Outcome(("annoyed",), stop=StopReason.CLOSED)
        return Outcome(("answers",), engagement=0.5, next=Observation(f"answer {self.step_number}", ALLOWED))


class ToyEnv(Environment):
    name = "toy"
    max_turns = 4

    def __init__(self, *ids):
        self.ids = ids

    @classmethod
    def load(cls, data):
        return cls("g0", "g1", "g2")

    def goals(self, split):
        return [goal(name) for name in self.ids] if split == "train" else []

    def catalogue(self, goal):
        return [Strategy(name, name, name) for name in ("ask", "close", "solve")]

    def start(self, goal, seed):
        return ToyDialogue(goal, seed)


def goal(name="g0"):
    return Goal(name, "toy", "context", {"solve": 1.0})


def test_full_skill_takes_the_most_relevant_and_ties_go_by_catalogue_order():
    trajectory = play(ToyEnv(), goal(), 0, 5, ScriptedPolicy(skill=1.0, slip=0.0))
    assert [turn.strategy for turn in trajectory.turns] == ["ask", "close"]  # "solve" is as relevant, but listed later
    assert trajectory.stop is StopReason.CLOSED


def test_turns_are_filled_with_the_state_before_the_step():
    first, second = play(ToyEnv(), goal(), 0, 5, ScriptedPolicy(slip=0.0)).turns
    assert (first.user, first.allowed, first.forced, first.expert_logprob) == ("hello 5", ("ask",), True, 0.0)
    assert (first.events, first.engagement, first.on_task) == (("answers",), 0.5, False)
    assert (second.user, second.allowed, second.forced) == ("answer 1", ALLOWED, False)
    assert (second.briefing, second.expected) == ("briefing 1 close", ("fact 1 close",))
    assert second.reply == "reply close: fact 1 close"
    assert second.relevance == {"ask": 1, "solve": 3, "close": 3}


def test_dialogues_are_scored_and_carry_no_streams():
    policy = ScriptedPolicy(skill=0.0)
    solved = next(t for t in (play(ToyEnv(), goal(), i, 0, policy) for i in range(50)) if t.success)
    closed = play(ToyEnv(), goal(), 0, 0, ScriptedPolicy(skill=1.0))
    assert solved.rewards["tse"] > closed.rewards["tse"] == 0.0
    assert (solved.rewards["success"], closed.rewards["success"]) == (1.0, 0.0)
    assert solved.streams == {}


@pytest.mark.parametrize(("skill", "best"), [(0.0, 1 / 3), (0.4, 0.6), (0.7, 0.8), (1.0, 1.0)])
def test_choices_follow_their_stated_probability(skill, best):
    policy, rng, n = ScriptedPolicy(skill), random.Random(0), 6000
    counts, stated = Counter(), {}
    for _ in range(n):
        choice, logprob = policy.choose(ALLOWED, {"ask": 1, "solve": 3}, ALLOWED, rng)
        counts[choice] += 1
        stated[choice] = math.exp(logprob)
    assert stated["solve"] == pytest.approx(best)
    assert sum(stated.values()) == pytest.approx(1.0)
    for choice, probability in stated.items():
        assert counts[choice] / n == pytest.approx(probability, abs=0.03)  # over 4 standard errors


def test_a_slip_is_the_reply_of_another_allowed_strategy():
    first, second = play(ToyEnv(), goal(), 0, 0, ScriptedPolicy(slip=1.0)).turns
    assert first.reply.startswith("reply ask")  # nothing else was allowed
    assert second.strategy == "close"
    assert second.reply.split(":")[0] in ("reply ask", "reply solve")


def test_equal_seeds_give_equal_dialogues_in_any_order_and_others_differ():
    policy = ScriptedPolicy(skill=0.3, seed=1, slip=0.3)
    forward = [play(ToyEnv(), goal(), sample, 0, policy) for sample in range(20)]
    backward = [play(ToyEnv(), goal(), sample, 0, policy) for sample in reversed(range(20))]
    assert forward == backward[::-1]
    replies = {tuple(turn.reply for turn in trajectory.turns) for trajectory in forward}
    assert len(replies) > 3
    other = [play(ToyEnv(), goal(), sample, 0, ScriptedPolicy(0.3, seed=2, slip=0.3)) for sample in range(20)]
    assert other != forward


def test_the_environments_turn_limit_ends_a_dialogue():
    stops = [play(ToyEnv(), goal(), sample, 0, ScriptedPolicy(skill=0.0)) for sample in range(60)]
    cut = [trajectory for trajectory in stops if trajectory.stop is StopReason.MAX_TURNS]
    assert cut
    assert {len(trajectory.turns) for trajectory in cut} == {4}


@pytest.mark.parametrize(
    ("name", "error"), [("broken", "RuntimeError: database gone"), ("endless", "a stop reason or a next turn")]
)
def test_a_failing_environment_quarantines_one_dialogue(name, error):
    trajectory = play(ToyEnv(), goal(name), 3, 4, ScriptedPolicy())
    assert trajectory.stop is StopReason.FAILED
    assert error in trajectory.error
    assert trajectory.rewards == {}
    assert (trajectory.sample, trajectory.seed) == (3, 4)


def test_demonstrations_go_round_the_training_goals_with_fresh_seeds():
    shown = list(demonstrations(ToyEnv("g0", "g1"), 5, skill=1.0, seed=0))
    assert [(t.goal.id, t.sample) for t in shown] == [("g0", 0), ("g1", 0), ("g0", 1), ("g1", 1), ("g0", 2)]
    assert len({t.seed for t in shown}) == 5
    assert list(demonstrations(ToyEnv("g0", "g1"), 5, skill=1.0, seed=0)) == shown
    assert next(demonstrations(ToyEnv("g0"), 1, skill=1.0, seed=1)).seed != shown[0].seed


def test_failed_demonstrations_are_skipped():
    shown = list(demonstrations(ToyEnv("g0", "broken"), 4, skill=1.0, seed=0))
    assert [t.goal.id for t in shown] == ["g0"] * 4


def test_an_environment_that_always_fails_ends_with_its_error():
    with pytest.raises(DialogueError, match=r"toy: 11 demonstrations failed.*database gone"):
        list(demonstrations(ToyEnv("broken"), 2, skill=1.0, seed=0))


def test_demonstrations_need_training_goals():
    with pytest.raises(DialogueError, match="no training goals"):
        list(islice(demonstrations(ToyEnv(), 1, skill=1.0, seed=0), 1))


@pytest.mark.parametrize("options", [{"skill": 1.5}, {"skill": -0.1}, {"slip": 2.0}, {"skill": math.nan}])
def test_probabilities_are_checked(options):
    with pytest.raises(ConfigError, match="not a probability"):
        ScriptedPolicy(**options)
