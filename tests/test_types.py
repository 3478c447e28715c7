"""Records of trajectories."""

import json
from dataclasses import asdict

from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn


def test_a_record_is_the_dataclasses_fields_in_order():
    """``to_json`` takes a short cut around ``asdict`` for the streams: not a byte of the record may show it."""
    streams = {
        "expert": Stream([1, 2, 3], [(1, 2)], [0.0, -0.25, 0.0], [[2, 9]]),
        "responder": Stream([4, 5], [(0, 1), (1, 2)], [-1.5, -2.0], [[], []]),
    }
    goal = Goal("g", "refund", "Desk.", {"find": 1.0}, {"order": "12"}, {"patience": 3}, {"secret": {"a": [1]}})
    turns = [Turn("hi", ("a", "b"), "a", "ok", relevance={"a": 3}, completed=("find",), expert_logprob=-0.5)]
    trajectory = Trajectory(goal, 1, 7, turns, StopReason.COMPLETED, streams, {"tse": 50.0}, None, "agenda")
    plain = asdict(trajectory)
    del plain["goal"]["data"]
    plain |= {"stop": "completed", "success": True}
    assert plain["turns"][0].pop("reply_group") == ()  # absent where one reply was drawn
    assert json.dumps(trajectory.to_json()) == json.dumps(plain)
    turns[0].reply_group = (0.5, 1.0)
    assert trajectory.to_json()["turns"][0]["reply_group"] == (0.5, 1.0)
    assert goal.data == {"secret": {"a": [1]}}
