"""Plays a policy over goals: many dialogues at once, each kept on disk as it ends, none played twice."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from openrlhf_gopo.envs.base import Environment
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.rewards.custom import Rewards
from openrlhf_gopo.rollout.agent import Policy
from openrlhf_gopo.rollout.dialogue import BUILT_IN, Limits, dialogue_seed, run_dialogue
from openrlhf_gopo.types import Goal, StopReason, Trajectory

logger = logging.getLogger(__name__)

HOPELESS = 20  # failed dialogues, and not one that did not fail, after which a policy is given up


@dataclass(frozen=True)
class Job:
    """One dialogue to play. Policies that get equal jobs meet the same users."""

    goal: Goal
    sample: int
    seed: int

    @classmethod
    def of(cls, goals: Iterable[Goal], samples: int, seed: int) -> list[Job]:
        """``samples`` dialogues a goal, with the seeds of a training run's own evaluations at ``--train.seed``."""
        return [cls(goal, sample, dialogue_seed(seed, goal, sample)) for goal in goals for sample in range(samples)]

    @property
    def key(self) -> tuple[str, int, int]:
        return self.goal.id, self.sample, self.seed


async def evaluate(
    env: Environment,
    jobs: Sequence[Job],
    build: Callable[[], Policy],
    limits: Limits,
    path: Path,
    *,
    concurrency: int = 64,
    attempts: int = 2,
    rewards: Rewards = BUILT_IN,
    label: str = "",
) -> list[Trajectory]:
    """Play what ``path`` does not hold yet, and append it there; returns one trajectory per job, in their order.

    ``build`` makes the policy, which may start engines: it is called only when there is something to play.
    A failing dialogue is played ``attempts`` times; failed ones that ``path`` holds are played again.

    Raises:
        DialogueError: the first ``HOPELESS`` dialogues failed, all of them; names the commonest cause.
        DataError: ``path`` holds something else than trajectories.
    """
    kept = {_key(t): t for t in _resume(path) if t.stop is not StopReason.FAILED}
    missing = [job for job in jobs if job.key not in kept]
    if not missing:
        return [kept[job.key] for job in jobs]
    policy = build()
    todo, causes, played = iter(missing), Counter[str](), 0
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=label, unit="dialogue", dynamic_ncols=True)

    async def play(job: Job) -> Trajectory:
        for _ in range(attempts):
            trajectory = await run_dialogue(
                env, job.goal, policy, limits, sample=job.sample, seed=job.seed, rewards=rewards
            )
            if trajectory.stop is not StopReason.FAILED:
                break
        append_trajectory(path, trajectory)
        return trajectory

    async def work() -> None:
        nonlocal played
        for job in todo:
            kept[job.key] = trajectory = await play(job)
            played += 1
            bar.update()
            if trajectory.stop is StopReason.FAILED:
                causes[trajectory.cause] += 1
            if causes.total() == played >= HOPELESS:
                cause, times = causes.most_common(1)[0]
                raise DialogueError(f"{label}: the first {played} dialogues failed, {times} of them with: {cause}")

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        bar.close()
    for cause, times in causes.most_common(3):
        logger.warning("%s: %d of %d dialogues failed with: %s", label, times, len(jobs), cause)
    return [kept[job.key] for job in jobs]


def _key(trajectory: Trajectory) -> tuple[str, int, int]:
    return trajectory.goal.id, trajectory.sample, trajectory.seed


def _resume(path: Path) -> list[Trajectory]:
    """What an earlier run left; the line that a kill tore is cut off, its dialogue is played again."""
    if not path.exists():
        return []
    with path.open("rb+") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            logger.warning("%s: the last line is torn and cut off; its dialogue is played again", path)
            file.truncate(whole)
    return read_trajectories(path)
