"""BLEU and chrF of a policy's replies where a human replied too: environments whose goals come from human dialogues.

The reference of a reply is what the human agent of the same goal said under the same strategy: the n-th use of a
strategy goes with its n-th use by the human, whatever happened in between. A reply under a strategy that the human used
less often has none; ``referenced`` says how many have one. The pairing is ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from openrlhf_gopo.envs.base import SPLITS, Environment, HumanTurn
from openrlhf_gopo.rewards.reference import reference_scores
from openrlhf_gopo.types import Goal, StopReason, Trajectory


def add_reference_scores(env: Environment, trajectories: Iterable[Trajectory]) -> None:
    """Add ``referenced`` (share of the replies that have a reference, in [0, 1]) to the rewards of every dialogue whose
    goal has a human one, and ``bleu`` and ``chrf`` ([0, 100], of its replies as one corpus) where it is above 0.

    Goals are found by id: records on disk lack what the environment keeps to itself. Failed dialogues stay as they are.
    """
    goals: Mapping[str, Goal] = {goal.id: goal for split in SPLITS for goal in env.goals(split)}
    for trajectory in trajectories:
        goal = goals.get(trajectory.goal.id)
        human = env.human(goal) if goal and trajectory.turns and trajectory.stop is not StopReason.FAILED else ()
        if human:
            pairs = reference_pairs(trajectory, human)
            language = str(trajectory.goal.persona.get("language", "en"))
            trajectory.rewards["referenced"] = len(pairs) / len(trajectory.turns)
            trajectory.rewards |= reference_scores(pairs, language)


def reference_pairs(trajectory: Trajectory, human: Sequence[HumanTurn]) -> list[tuple[str, str]]:
    """(reply, reference) of every turn that has a reference, in order; see the module.

    What a human said in several messages under one strategy before the user answered is one reply, as an agent of ours
    gives.
    """
    said: defaultdict[str, list[str]] = defaultdict(list)
    before = ""
    for turn in human:
        if turn.strategy and turn.strategy == before and not turn.user:
            said[turn.strategy][-1] += f" {turn.reply}"
        elif turn.strategy:
            said[turn.strategy].append(turn.reply)
        before = turn.strategy
    used: defaultdict[str, int] = defaultdict(int)
    pairs = []
    for ours in trajectory.turns:
        n = used[ours.strategy]
        used[ours.strategy] += 1
        if n < len(said[ours.strategy]) and said[ours.strategy][n].strip():
            pairs.append((ours.reply, said[ours.strategy][n]))
    return pairs
