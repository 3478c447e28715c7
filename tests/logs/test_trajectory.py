"""A log as a trajectory: what maps where, what the defaults are, and that every valid log has a score in bounds."""

import doctest
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.logs import Dialogue, measured, read, schema, to_trajectory
from openrlhf_gopo.logs.trajectory import ENGAGEMENT, NEUTRAL
from openrlhf_gopo.rewards import METRICS
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn


def parse(record):
    return Dialogue.model_validate_json(json.dumps(record))


def test_a_dialogue_maps_field_by_field(good):
    goal = Goal(
        "c-17",
        "refund",
        "The customer is known.",
        {"find": 0.4, "refund": 0.6},
        {"order": "A1"},
        {"source": "chat export", "language": "en"},
    )
    first = Turn(
        user="My mug broke.",
        allowed=("look_up_order", "close"),
        strategy="look_up_order",
        reply="I found order A1.",
        briefing="Order A1: one mug.",
        events=("answer",),
        completed=("find",),
        engagement=0.8,
        on_task=True,
    )
    second = Turn("Please.", (), "give_refund", "Done.", completed=("refund",), engagement=1.0, on_task=True)
    trajectory = to_trajectory(parse(good))
    assert trajectory == Trajectory(goal, 0, 0, [first, second], StopReason.COMPLETED)
    assert trajectory.success


def test_the_goal_may_have_an_id_of_its_own(good):
    good["goal"]["id"] = "shared"
    assert to_trajectory(parse(good)).goal.id == "shared"


@pytest.mark.parametrize(
    ("fields", "engagement", "on_task"),
    [
        ({}, NEUTRAL, False),
        ({"events": ["unheard of"]}, NEUTRAL, False),
        ({"events": ["thanks"]}, ENGAGEMENT["thanks"], False),
        ({"events": ["leave", "unheard of", "reply"]}, (ENGAGEMENT["leave"] + ENGAGEMENT["reply"]) / 2, False),
        ({"events": ["thanks"], "engagement": 0.25}, 0.25, False),
        ({"on_task": True}, NEUTRAL, True),
        ({"completed": ["find"]}, NEUTRAL, True),
        ({"completed": ["find"], "on_task": False}, NEUTRAL, False),
    ],
)
def test_engagement_and_focus_have_defaults(good, fields, engagement, on_task):
    good["turns"][0] = {"user": "", "strategy": None, "reply": " Hi. ", **fields}
    done = "completed" in fields
    good["outcome"] = {"stop": "completed" if done else "closed", "success": done}
    turn = to_trajectory(parse(good)).turns[0]
    assert (turn.engagement, turn.on_task) == (pytest.approx(engagement), on_task)
    assert (turn.strategy, turn.reply, turn.allowed, turn.forced) == ("", "Hi.", (), False)


def test_the_schema_names_the_events():
    described = schema.LoggedTurn.model_fields["events"].description
    assert all(re.search(rf"\b{event}\b", described) for event in ENGAGEMENT)


def test_one_allowed_strategy_is_forced(good):
    good["turns"][0]["allowed"] = ["look_up_order"]
    assert [turn.forced for turn in to_trajectory(parse(good)).turns] == [True, False]


def test_only_what_the_log_tells_is_measured(good):
    """By hand: P = 1, E = (0.8 + 1) / 2 = 0.9, TSE = 100 (0.5 + 0.45) = 95."""

    def unknown():
        return {name for name, value in measured(to_trajectory(parse(good))).items() if math.isnan(value)}

    assert list(measured(to_trajectory(parse(good)))) == list(METRICS)
    assert measured(to_trajectory(parse(good)))["tse"] == pytest.approx(95)
    assert unknown() == {"esndcg", "realised", "gre", "sop"}
    good["turns"][1]["allowed"] = ["close"]
    assert unknown() == {"esndcg", "realised", "gre"}
    assert measured(to_trajectory(parse(good)))["sop"] == 0.5
    good["turns"][1]["strategy"] = None
    assert "sop" in unknown()
    del good["turns"][0]["briefing"]
    assert "grounded" in unknown()


def test_a_dialogue_survives_writing_and_reading(good, write):
    dialogue = parse(good)
    ((line, again),) = read(write(dialogue.model_dump_json(exclude_defaults=True).encode()))
    assert (line, again) == (1, dialogue)


def test_a_trajectory_survives_the_trajectories_file(good, tmp_path):
    trajectory = to_trajectory(parse(good))
    append_trajectory(tmp_path / "t.jsonl", trajectory)
    assert read_trajectories(tmp_path / "t.jsonl") == [trajectory]


def test_the_example_in_the_documentation_is_valid():
    text = schema.__doc__
    end = '"success": true}}'
    example = text[text.index("{") : text.index(end) + len(end)]
    assert to_trajectory(parse(json.loads(example))).success
    assert not doctest.testmod(schema).failed


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
REPLIES = TEXTS.filter(lambda text: text.strip())


@st.composite
def dialogues(draw):
    """Valid records of every shape: subgoals in any order, done or not, optional fields there or not."""
    raw = draw(st.dictionaries(NAMES, st.floats(0.01, 1.0), min_size=1, max_size=5))
    weights = {name: value / math.fsum(raw.values()) for name, value in raw.items()}
    count = draw(st.integers(1, 6))
    done_at = {name: draw(st.integers(0, count)) for name in weights}  # ``count`` is never
    turns = []
    for index in range(count):
        turn = {"user": draw(TEXTS), "strategy": draw(st.none() | NAMES), "reply": draw(REPLIES)}
        optional = {
            "briefing": TEXTS,
            "events": st.lists(st.sampled_from([*ENGAGEMENT, "other"]), max_size=3),
            "allowed": st.lists(NAMES, min_size=1, max_size=4, unique=True),
            "engagement": st.floats(0, 1),
            "on_task": st.booleans(),
        }
        turn |= {name: draw(values) for name, values in optional.items() if draw(st.booleans())}
        turns.append(turn | {"completed": [name for name, at in done_at.items() if at == index]})
    success = all(at < count for at in done_at.values())
    stops = ["completed"] if success else [r.value for r in StopReason if r is not StopReason.COMPLETED]
    return {
        "id": draw(NAMES),
        "source": draw(NAMES),
        "language": "en",
        "goal": {"intent": draw(NAMES), "context": draw(TEXTS), "subgoals": weights},
        "turns": turns,
        "outcome": {"stop": draw(st.sampled_from(stops)), "success": success},
    }


@settings(max_examples=200, deadline=None)
@given(dialogues())
def test_every_valid_dialogue_has_scores_in_bounds(record):
    dialogue = parse(record)
    trajectory = to_trajectory(dialogue)
    assert trajectory.success == record["outcome"]["success"]
    assert trajectory.stop.value == record["outcome"]["stop"]
    found = measured(trajectory)
    assert 0.0 <= found.pop("tse") <= 100.0 + 1e-9
    assert found.pop("turns") == len(record["turns"])
    assert all(math.isnan(value) or 0.0 <= value <= 1.0 for value in found.values())
    assert parse(json.loads(dialogue.model_dump_json(exclude_defaults=True))) == dialogue
