"""STAR's dialogues with the user's answer, and the scores that ``tse_validity.py`` holds against it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from openrlhf_gopo.envs.base import SPLITS
from openrlhf_gopo.envs.star import Star
from openrlhf_gopo.envs.star_outcome import of_rounds, standing
from openrlhf_gopo.envs.star_script import Script
from openrlhf_gopo.envs.star_sop import SHARED
from openrlhf_gopo.errors import DataError
from openrlhf_gopo.logs import star, to_trajectory
from openrlhf_gopo.logs.schema import Dialogue
from openrlhf_gopo.rewards.tse import focused_engagement, progress, tse
from openrlhf_gopo.types import Trajectory

# (slots, reports, outcomes, goodbye): the weights of envs/star.py before outcomes were subgoals, and on the way.
BEFORE, BETWEEN = (0.3, 0.6, 0.0, 0.1), (0.2, 0.3, 0.4, 0.1)
KINDS = ("slot", "report", "outcome", "close")
HALVES = ("development", "held out")
FOLDS = 10
INNER = (*SHARED, "")  # no strategy of a task of its own


@dataclass(frozen=True)
class Case:
    """One dialogue whose user answered ``done``. ``fits``: False where the question is about another task.

    ``obtained``: the outcome subgoals by the tool's results, as a rollout judges them.
    """

    trajectory: Trajectory
    script: Script
    obtained: frozenset[str]
    done: bool
    fits: bool
    half: str

    @property
    def task(self) -> str:
        """The task of the dialogue."""
        return self.trajectory.goal.intent


def cases(folder: Path) -> tuple[list[Case], int]:
    """The dialogues with an answer, and the number of all that have a goal.

    Raises:
        DataError: the folder is malformed, or nobody was asked.
    """
    env = Star.load(str(folder))
    logged = (to_trajectory(Dialogue.model_validate_json(json.dumps(record))) for _, record in star.records(folder))
    trajectories = {trajectory.goal.id: trajectory for trajectory in logged}
    found = []
    for goal in (goal for split in SPLITS for goal in env.goals(split)):
        script, manual = env.script(goal)
        answer = script.record.done
        if answer is None:
            continue
        booked = any("reserve" in question for question in script.record.answers)
        obtained = frozenset(name for names in standing(of_rounds(script)).values() for name in names)
        half = HALVES[hashlib.sha256(goal.id.encode()).digest()[0] % 2]
        fits = "book" in manual.queries or not booked
        found.append(Case(trajectories[goal.id], script, obtained, answer, fits, half))
    if not found:
        raise DataError(f"{folder}: no dialogue has the user's answer whether the task was done (UserQuestionnaire)")
    return found, len(trajectories)


def weighted_tse(trajectory: Trajectory, completed: Iterable[str], weights: Sequence[float]) -> float:
    """TSE with other weights of (slots, reports, outcomes, goodbye) and other ``completed`` outcomes.

    As in ``envs/star.py``, the slots' share goes to the reports where there are none to learn. With no weight on
    outcomes they do not count as on task either.
    """
    ids = {kind: [name for name in trajectory.goal.subgoals if name.startswith(f"{kind}:")] for kind in KINDS}
    share = dict(zip(KINDS, weights, strict=True))
    if not ids["slot"]:
        share |= {"slot": 0.0, "report": share["slot"] + share["report"]}
    subgoals = {name: share[kind] / len(names) for kind, names in ids.items() for name in names if share[kind]}
    done = set(completed)
    turns = []
    for turn in trajectory.turns:
        kept = tuple(n for n in turn.completed if n in subgoals and not n.startswith("outcome:"))
        on_task = bool(kept) or (turn.on_task and (bool(share["outcome"]) or not turn.completed))
        turns.append(replace(turn, completed=kept, on_task=on_task))
    if turns:
        got = tuple(name for name in ids["outcome"] if name in done and name in subgoals)
        turns[-1] = replace(turns[-1], completed=turns[-1].completed + got)
    return tse(replace(trajectory, goal=replace(trajectory.goal, subgoals=subgoals), turns=turns))


def words(trajectory: Trajectory) -> int:
    """Words of both parties."""
    return sum(len(text.split()) for turn in trajectory.turns for text in (turn.user, turn.reply))


def last_strategy(trajectory: Trajectory, besides: Iterable[str] = ()) -> str:
    """The last strategy that is none of ``besides``; "" where its turn has no label."""
    return next((turn.strategy for turn in reversed(trajectory.turns) if turn.strategy not in besides), "")


def learned_rates(keys: Sequence[str], done: np.ndarray, taught: np.ndarray) -> np.ndarray:
    """For every dialogue the share of yes among the ``taught`` ones with its key, one prior dialogue added.

    NaN for the taught ones: their rates know their own answers, and leaving out one's own sinks it below the others'.
    """
    prior = float(done[taught].mean()) if taught.any() else 0.5
    yes, asked = Counter[str](), Counter[str]()
    for index in np.flatnonzero(taught):
        yes[keys[index]] += int(done[index])
        asked[keys[index]] += 1
    rates = [(yes[key] + prior) / (asked[key] + 1) for key in keys]
    return np.where(taught, np.nan, rates)


def scores_of(found: Sequence[Case], done: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The scores by name: TSE with its parts and the baselines, and TSE on the way to its definition."""
    taught = np.array([case.half == HALVES[0] for case in found])

    def each(score: Callable[[Trajectory], float]) -> np.ndarray:
        return np.array([score(case.trajectory) for case in found], dtype=float)

    def rates(key: Callable[[Case], str]) -> np.ndarray:
        return learned_rates([key(case) for case in found], done, taught)

    def weighted(weights: Sequence[float], of: Callable[[Case], Iterable[str]]) -> np.ndarray:
        return np.array([weighted_tse(case.trajectory, of(case), weights) for case in found])

    main = {
        "**TSE**": each(tse),
        "P alone (subgoals)": each(progress),
        "E alone (engagement on task)": each(focused_engagement),
        "success (every subgoal)": each(lambda t: float(t.success)),
        "number of turns": each(lambda t: float(len(t.turns))),
        "fewer turns": each(lambda t: -float(len(t.turns))),
        "fewer words": each(lambda t: -float(words(t))),
        "last strategy, rate learned": rates(lambda c: last_strategy(c.trajectory)),
        "last strategy of the task's own, rate learned": rates(lambda c: last_strategy(c.trajectory, INNER)),
        "task alone, rate learned": rates(lambda c: c.task),
    }
    path = {
        "before: no outcome subgoals": weighted(BEFORE, lambda c: ()),
        "+ outcomes by the tool's results": weighted(BETWEEN, lambda c: c.obtained),
        "+ outcomes by what the customer was told": weighted(BETWEEN, lambda c: c.trajectory.completed),
        "+ outcomes half of the weight, goodbye 0.05: TSE": each(tse),
    }
    return main, path


def forest(found: Sequence[Case], done: np.ndarray) -> np.ndarray:
    """What a random forest tells from many features of the log and the task, out of fold: an estimate of the ceiling.

    Raises:
        DataError: an answer is rarer than the folds, or scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    except ImportError as error:
        raise DataError("--ceiling needs scikit-learn: pip install scikit-learn") from error
    if min(done.sum(), (~done).sum()) < FOLDS:
        raise DataError(f"--ceiling: needs {FOLDS} dialogues of each answer")
    rows = []
    for case in found:
        t = case.trajectory
        row = {f"task {case.task}": 1.0, f"last {last_strategy(t)}": 1.0, f"own {last_strategy(t, INNER)}": 1.0}
        row |= {f"used {strategy}": float(n) for strategy, n in Counter(turn.strategy for turn in t.turns).items()}
        row |= {f"did {name}": 1.0 for name in t.completed if name.startswith("outcome:")}
        row |= {f"got {name}": 1.0 for name in case.obtained}
        row |= {"tse": tse(t), "P": progress(t), "E": focused_engagement(t), "turns": float(len(t.turns))}
        row |= {"words": float(words(t)), "rounds": float(len(case.script.rounds))}
        row |= {f"thanks {i}": float("thank" in turn.user.casefold()) for i, turn in enumerate(reversed(t.turns[-3:]))}
        rows.append(row)
    names = sorted({name for row in rows for name in row})
    table = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    trees = RandomForestClassifier(500, min_samples_leaf=3, random_state=0)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return cross_val_predict(trees, table, done, cv=folds, method="predict_proba")[:, 1]
