"""TSE, Task-focused Sequential Engagement. The name is the paper's; this formula is ours, not the paper's.

    P = sum_{j in C} v_j        E = (1/T) sum_t a_t f_t        TSE = 100 P ((1 - kappa) + kappa E)

v_j: weight of subgoal j (they sum to 1); C: the subgoals completed; a_t in [0, 1]: the user's engagement at turn t;
f_t in {0, 1}: the turn was on task; T: number of turns.
"""

from __future__ import annotations

import math

from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.types import Trajectory

KAPPA = 0.5


def progress(trajectory: Trajectory) -> float:
    """P in [0, 1]: the weight of the completed subgoals, each counted once.

    Raises:
        DialogueError: a turn completed a subgoal that the goal does not have.
    """
    weights = trajectory.goal.subgoals
    unknown = [subgoal for subgoal in trajectory.completed if subgoal not in weights]
    if unknown:
        raise DialogueError(
            f"goal {trajectory.goal.id}: completed {unknown[0]!r}, which is none of its subgoals {sorted(weights)}"
        )
    # fsum: the order in which subgoals were completed must not make a difference, however small.
    return math.fsum(weights[subgoal] for subgoal in trajectory.completed)


def focused_engagement(trajectory: Trajectory) -> float:
    """E in [0, 1]: engagement of the turns on task, averaged over all turns; 0 without turns."""
    turns = trajectory.turns
    return sum(turn.engagement for turn in turns if turn.on_task) / len(turns) if turns else 0.0


def tse(trajectory: Trajectory, kappa: float = KAPPA) -> float:
    """TSE in [0, 100]; 0 without turns. ``kappa`` in [0, 1] is the share that engagement decides.

    Two of three subgoals done (0.2 + 0.5), engagement 0.8 on task, then 0.6 off task: P = 0.7, E = 0.8 / 2 = 0.4,
    TSE = 100 x 0.7 x (0.5 + 0.5 x 0.4) = 49.

    >>> from openrlhf_gopo.types import Goal, Trajectory, Turn
    >>> goal = Goal("g", "refund", "", {"find": 0.2, "refund": 0.5, "close": 0.3})
    >>> done = Turn("hi", (), "look_up", "", completed=("find", "refund"), engagement=0.8, on_task=True)
    >>> idle = Turn("ok", (), "advertise", "", engagement=0.6)
    >>> round(tse(Trajectory(goal, 0, 0, [done, idle])), 6)
    49.0

    Raises:
        ConfigError: ``kappa`` is outside [0, 1].
    """
    if not 0.0 <= kappa <= 1.0:
        raise ConfigError(f"kappa={kappa}: TSE takes a kappa in [0, 1]")
    return 100.0 * progress(trajectory) * ((1.0 - kappa) + kappa * focused_engagement(trajectory))
