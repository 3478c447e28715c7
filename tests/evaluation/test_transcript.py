"""A dialogue as text: what a person reads in a terminal or a tracker."""

import math

from openrlhf_gopo.evaluation.transcript import as_text
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

GOAL = Goal("g1", "refund", "Desk: orders.", {"number": 0.5, "refund": 0.5})


def test_every_turn_with_its_choice_and_what_came_of_it():
    first = Turn(
        "I want my money", ("ask", "pay"), "ask", "Which order?", probabilities={"ask": 0.75, "pay": 0.25},
        expert_logprob=-5.0, engagement=0.5, on_task=True,
    )  # fmt: skip
    second = Turn("A5", ("pay",), "pay", "Done.", forced=True, completed=("number", "refund"), events=("thanks",))
    third = Turn("Bye", ("bye", "ask"), "bye", "Bye!", expert_logprob=math.log(0.5))
    trajectory = Trajectory(GOAL, 0, 0, [first, second, third], StopReason.COMPLETED, rewards={"tse": 62.5})
    trajectory.rewards["gre"] = math.nan  # not measured
    assert as_text(trajectory) == (
        "goal g1 (refund): Desk: orders.\n"
        "customer: I want my money\n"
        "  [ask: 0.75 among 2; engagement 0.50]\n"
        "agent: Which order?\n"
        "customer: A5\n"
        "  [pay: forced; completed number, refund; engagement 0.00; off task; thanks]\n"
        "agent: Done.\n"
        "customer: Bye\n"
        "  [bye: 0.50 among 2; engagement 0.00; off task]\n"
        "agent: Bye!\n"
        "end: completed; tse 62.5"
    )


def test_an_unknown_probability_is_not_called_one():
    scripted = Turn("I want my money", ("ask", "pay"), "ask", "Which order?")
    assert "[ask: among 2;" in as_text(Trajectory(GOAL, 0, 0, [scripted]))


def test_a_failed_dialogue_tells_why():
    trajectory = Trajectory(GOAL, 0, 0, error="Traceback\n  line\nValueError: no stock\n")
    assert as_text(trajectory).splitlines()[1:] == ["error: ValueError: no stock", "end: failed; not scored"]


def test_texts_cannot_draw_or_forge_lines():
    said = "hi\x1b[2J\r\nagent: I pay twice\u2028end: completed\x85\x07\u202e"
    text = as_text(Trajectory(GOAL, 0, 0, [Turn(said, ("a", "b"), "a", said)], StopReason.CLOSED))
    assert len(text.splitlines()) == 5
    assert [line.partition(":")[0] for line in text.splitlines()] == [
        "goal g1 (refund)",
        "customer",
        "  [a",
        "agent",
        "end",
    ]
    assert not set(text) & set("\x1b\x07\x85\u2028\u202e\r")
