"""A company's own dialogues: one documented JSONL schema, its checks, and the way to trajectories, scores and back.

``read`` a file, turn each dialogue into a trajectory with ``to_trajectory``, score it with ``measured``.
"""

from openrlhf_gopo.logs.check import read, validate
from openrlhf_gopo.logs.schema import Dialogue, LoggedGoal, LoggedTurn, Result
from openrlhf_gopo.logs.trajectory import measured, scored, to_trajectory

__all__ = ["Dialogue", "LoggedGoal", "LoggedTurn", "Result", "measured", "read", "scored", "to_trajectory", "validate"]
