"""From a logged dialogue to a ``Trajectory``, and to the metrics that a log can tell."""

from __future__ import annotations

import math

from openrlhf_gopo.logs.schema import Dialogue, LoggedTurn
from openrlhf_gopo.rewards.joint import score
from openrlhf_gopo.types import Goal, Trajectory, Turn

# Engagement a_t by the customer's reaction, where the log gives no number. The table is ours; several events of a turn
# are averaged.
ENGAGEMENT = {
    "purchase": 1.0,
    "thanks": 1.0,
    "cart": 0.95,
    "click": 0.95,
    "positive": 0.9,
    "answer": 0.8,
    "question": 0.8,
    "reply": 0.5,
    "refuse": 0.35,
    "object": 0.3,
    "negative": 0.2,
    "confused": 0.1,
    "leave": 0.0,
}
NEUTRAL = 0.5  # no event of the table: nothing is known of the reaction


def to_trajectory(dialogue: Dialogue) -> Trajectory:
    """The dialogue as a trajectory without streams, unscored.

    Source and language become persona traits, so that tables slice by them. White space around texts goes, as chat
    templates and the rollout's decoding drop it. Where the log does not say: ``goal.id`` is the dialogue's id,
    ``allowed`` is empty, ``strategy`` is "", ``engagement`` comes from ``ENGAGEMENT``, and a turn is on task when it
    completed a subgoal.
    """
    logged = dialogue.goal
    goal = Goal(
        id=logged.id or dialogue.id,
        intent=logged.intent,
        context=logged.context.strip(),
        subgoals=dict(logged.subgoals),
        facts=dict(logged.facts),
        persona={"source": dialogue.source, "language": dialogue.language},
    )
    return Trajectory(goal, 0, 0, [_turn(turn) for turn in dialogue.turns], dialogue.outcome.stop)


def _turn(logged: LoggedTurn) -> Turn:
    return Turn(
        user=logged.user.strip(),
        allowed=logged.allowed or (),
        strategy=logged.strategy or "",
        reply=logged.reply.strip(),
        briefing=logged.briefing.strip(),
        events=logged.events,
        completed=logged.completed,
        engagement=engagement(logged),
        on_task=bool(logged.completed) if logged.on_task is None else logged.on_task,
        forced=len(logged.allowed or ()) == 1,
    )


def engagement(turn: LoggedTurn) -> float:
    """The engagement in [0, 1] that the log gives, else the mean over its events in the table, else ``NEUTRAL``."""
    if turn.engagement is not None:
        return turn.engagement
    known = [ENGAGEMENT[event] for event in turn.events if event in ENGAGEMENT]
    return math.fsum(known) / len(known) if known else NEUTRAL


def scored(dialogue: Dialogue) -> Trajectory:
    """The dialogue as a trajectory with the metrics that a log can tell."""
    trajectory = to_trajectory(dialogue)
    trajectory.rewards = measured(trajectory)
    return trajectory


def measured(trajectory: Trajectory) -> dict[str, float]:
    """``rewards.joint.score``, with NaN ("not measured", which summaries leave out) for what this log cannot tell.

    ESNDCG needs grades of every strategy, and ``realised``, thus GRE, the strings that a reply had to contain: a log
    has neither. ``sop`` needs the allowed strategies and a label at every turn; ``grounded`` needs a briefing at one
    turn at least, or every value that a tool gave would count as made up.
    """
    turns = trajectory.turns
    unknown = {"esndcg", "realised", "gre"}
    unknown |= set() if all(turn.allowed and turn.strategy for turn in turns) else {"sop"}
    unknown |= set() if any(turn.briefing for turn in turns) else {"grounded"}
    return {name: math.nan if name in unknown else value for name, value in score(trajectory).items()}
