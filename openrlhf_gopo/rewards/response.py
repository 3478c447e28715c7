"""GRE, the quality of the replies, and its parts. The name is the paper's; these formulas are ours, not the paper's.

Per reply, each part in [0, 1]; a blank reply scores 0 in every part:

    realised       1 if the reply contains every expected string, else 0
    grounded       1 if every id, number and price of the reply occurs in what the agent knows, else 0
    no_repetition  (share of its word triples that are distinct) x (1 - share found in the most similar earlier reply)
    GRE            the mean of the three

What the agent knows: the goal's context, the briefings so far and what the user said so far; not its own replies, where
a value may be made up. Values are words with a digit: names without one are not checked. A trajectory's score is the
mean over its replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from openrlhf_gopo.rewards.text import mentions, values, words
from openrlhf_gopo.types import Trajectory, Turn

_GRAM = 3  # words (in Chinese: characters); shorter replies count as one gram


def realised(turn: Turn) -> float:
    """1.0 if the reply contains every expected string (case, spacing and price format aside), else 0.0.

    >>> realised(Turn("hi", (), "find", "Order a417 costs 35 dollars.", expected=("A417", "$35")))
    1.0
    """
    return float(bool(turn.reply.strip()) and all(mentions(turn.reply, string) for string in turn.expected))


def grounded(turn: Turn, knowledge: set[str]) -> float:
    """1.0 if every value of the reply is in ``knowledge`` (made by ``values``), else 0.0.

    >>> grounded(Turn("hi", (), "find", "Order A417 arrives in 3 days."), {"a417"})
    0.0
    """
    return float(bool(turn.reply.strip()) and values(turn.reply) <= knowledge)


def no_repetition(reply: str, earlier: Sequence[str]) -> float:
    """How new a reply is, within itself and against each earlier reply: 1.0 nothing repeated, 0.0 said before.

    Four words, thus two triples, one of them in an earlier reply: 1 x (1 - 1/2) = 0.5.

    >>> no_repetition("i am sorry today", ["i am sorry"])
    0.5
    """
    grams = _grams(reply)
    if not grams:
        return 0.0
    distinct = set(grams)
    seen = max((len(distinct.intersection(_grams(other))) for other in earlier), default=0)
    return len(distinct) / len(grams) * (1.0 - seen / len(distinct))


def reply_scores(trajectory: Trajectory) -> list[dict[str, float]]:
    """``realised``, ``grounded``, ``no_repetition`` and ``gre`` of every reply, each in [0, 1]."""
    knowledge = values(trajectory.goal.context)
    scores: list[dict[str, float]] = []
    earlier: list[str] = []
    for turn in trajectory.turns:
        knowledge |= values(turn.user) | values(turn.briefing)
        scores.append(_scores(turn, knowledge, earlier))
        earlier.append(turn.reply)
    return scores


def candidate_scores(context: str, past: Sequence[Turn], turn: Turn, replies: Sequence[str]) -> list[dict[str, float]]:
    """What ``reply_scores`` would give ``turn``, which follows ``past``, with each of ``replies`` in place of its own.

    ``context``: the goal's.

    >>> turn = Turn("hi", (), "find", "", briefing="Order A417.", expected=("A417",))
    >>> [scores["gre"] for scores in candidate_scores("", [], turn, ["It is A417 indeed.", ""])]
    [1.0, 0.0]
    """
    knowledge = values(context).union(*(values(t.user) | values(t.briefing) for t in (*past, turn)))
    earlier = [t.reply for t in past]
    return [_scores(replace(turn, reply=reply), knowledge, earlier) for reply in replies]


def _scores(turn: Turn, knowledge: set[str], earlier: Sequence[str]) -> dict[str, float]:
    parts = {
        "realised": realised(turn),
        "grounded": grounded(turn, knowledge),
        "no_repetition": no_repetition(turn.reply, earlier),
    }
    return {**parts, "gre": sum(parts.values()) / len(parts)}


def response_scores(trajectory: Trajectory) -> dict[str, float]:
    """The means of ``reply_scores`` over the trajectory's replies; 0 without turns."""
    replies = reply_scores(trajectory)
    names = ("realised", "grounded", "no_repetition", "gre")
    return {name: sum(reply[name] for reply in replies) / max(len(replies), 1) for name in names}


def gre(trajectory: Trajectory) -> float:
    """GRE in [0, 1]; 0 without turns."""
    return response_scores(trajectory)["gre"]


@lru_cache(maxsize=4096)  # a reply is compared with every later one, and scored once per role
def _grams(text: str) -> tuple[tuple[str, ...], ...]:
    said = words(text)
    if not said:
        return ()
    return tuple(tuple(said[i : i + _GRAM]) for i in range(max(1, len(said) - _GRAM + 1)))
