"""Rewards beyond the built-in ones: ``--gopo.reward``, comma-separated.

    path/to/file.py:name    a callable in a file
    name                    an entry point of another package, group ``openrlhf_gopo.rewards``
    judge:MODEL@URL         a language model behind an OpenAI-compatible endpoint (``rewards.judge``)
    remote:URL              a server of OpenRLHF's --reward.remote_url (``rewards.remote``); several share the work

A callable takes a scored-to-be ``Trajectory``, which it must not change, and returns a float: the metric that has the
callable's name. One that measures several things says so in an attribute ``metrics``, a tuple of names, and returns a
dict with a float for each. A class is built without arguments, once per process, and its instance called:

    def short(trajectory):
        return 1.0 / (1 + len(trajectory.turns))

Such a metric stands beside the built-in ones: in --gopo.expert_reward and --gopo.responder_reward, the log and the
report. It may wait (network, disk): it is called in a thread, and the engine goes on. One that raises, returns anything
else, or takes longer than --gopo.reward_timeout fails its dialogue, and no other.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from numbers import Real
from typing import Any

from openrlhf_gopo.config import GopoConfig, JudgeConfig
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.plugins import find_callable
from openrlhf_gopo.rewards.joint import METRICS, score
from openrlhf_gopo.threads import in_thread
from openrlhf_gopo.types import Trajectory

FLAG = "--gopo.reward"
ENTRY_POINTS = "openrlhf_gopo.rewards"
OTHERS = ("judge:MODEL@URL", "remote:URL")
RESERVED = (
    *METRICS,
    "engagement",
    "failures",
    "bleu",
    "chrf",
    "referenced",
)  # what summaries and logs measure themselves


@dataclass(frozen=True)
class RewardSpec:
    """``--gopo.reward``, the settings of ``judge:MODEL@URL``, and --gopo.reward_timeout in seconds."""

    rewards: str = ""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    timeout: float = 60.0

    @classmethod
    def of(cls, config: GopoConfig) -> RewardSpec:
        return cls(config.reward or "", config.judge, config.reward_timeout)


class Reward:
    """One callable under the name that it was given by; checks what it returns.

    ``flag``: begins every message. ``metrics``: the names of what it measures. ``asks``: it sends requests.

    Raises:
        ConfigError: ``metrics`` is no tuple of usable names, or has one of ``RESERVED``.
    """

    def __init__(self, given: str, name: str, function: Callable[[Trajectory], Any], asks: bool = False) -> None:
        self.flag, self.asks, self._function = f"{FLAG} {given}", asks, function
        declared = getattr(function, "metrics", None)
        self._several = declared is not None
        self.metrics: tuple[str, ...] = (name,) if declared is None else declared
        listed = isinstance(self.metrics, (tuple, list)) and self.metrics
        if not listed or any(not isinstance(m, str) or not re.fullmatch(r"[A-Za-z][\w./-]*", m) for m in self.metrics):
            raise ConfigError(f"{self.flag}: metrics = {declared!r}: give a tuple of names, as in ('polite', 'brief')")
        taken = [metric for metric in self.metrics if metric in RESERVED]
        if taken:
            raise ConfigError(f"{self.flag}: {taken[0]} is a built-in metric; give this one another name")

    def __call__(self, trajectory: Trajectory) -> dict[str, float]:
        """Its metrics of ``trajectory``.

        Raises:
            DialogueError: it raised, or returned something else; names the reward.
        """
        try:
            found = self._function(trajectory)
        except (Exception, SystemExit) as error:
            if isinstance(error, DialogueError) and str(error).startswith(self.flag):  # a judge's or server's own
                raise
            raise DialogueError(f"{self.flag}: {type(error).__name__}: {error}") from error
        if not self._several:
            found = {self.metrics[0]: found}
        if not isinstance(found, Mapping) or set(found) != set(self.metrics):
            raise DialogueError(f"{self.flag}: returned {found!r:.80}; its metrics are {', '.join(self.metrics)}")
        for metric, value in found.items():
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise DialogueError(f"{self.flag}: {metric} is {value!r:.80}; a reward is a finite float")
        return {metric: float(found[metric]) for metric in self.metrics}


class Rewards:
    """The built-in metrics and those of ``further``. ``timeout``: seconds that each of ``further`` may take.

    ``metrics``: all names.

    Raises:
        ConfigError: two of ``further`` measure something of the same name.
    """

    def __init__(self, further: Sequence[Reward] = (), timeout: float = 60.0) -> None:
        self.further, self.timeout = tuple(further), timeout
        self.metrics: tuple[str, ...] = METRICS
        for reward in self.further:
            twice = [metric for metric in reward.metrics if metric in self.metrics]
            if twice:
                raise ConfigError(f"{reward.flag}: an earlier reward measures {twice[0]} too; rename one")
            self.metrics += tuple(reward.metrics)

    def score(self, trajectory: Trajectory) -> dict[str, float]:
        """``joint.score``, and the metrics of ``further``: like those, 0 without turns.

        Raises:
            DialogueError: see ``Reward``, or one took too long.
        """
        scores = score(trajectory)
        pending = self._start(trajectory)
        wait(pending, self.timeout)
        return scores | self._collect(trajectory, pending)

    async def score_further(self, trajectory: Trajectory) -> dict[str, float]:
        """The metrics of ``further`` alone, waited for without holding up the event loop; see ``score``."""
        pending = self._start(trajectory)
        if pending:
            done, late = await asyncio.wait(map(asyncio.wrap_future, pending), timeout=self.timeout)
            for wrapped in late:
                wrapped.cancel()
            for wrapped in done:
                wrapped.exception()  # asyncio logs an error that nobody looked at; it is raised from ``pending``
        return self._collect(trajectory, pending)

    def _start(self, trajectory: Trajectory) -> list[Future[dict[str, float]]]:
        asked = self.further if trajectory.turns else ()
        return [in_thread(partial(reward, trajectory), "gopo-reward") for reward in asked]

    def _collect(self, trajectory: Trajectory, pending: Sequence[Future[dict[str, float]]]) -> dict[str, float]:
        if not trajectory.turns:
            return dict.fromkeys(self.metrics[len(METRICS) :], 0.0)
        scores: dict[str, float] = {}
        for reward, future in zip(self.further, pending, strict=True):
            if not future.done():
                raise DialogueError(f"{reward.flag}: no answer in --gopo.reward_timeout {self.timeout:g} s; raise it")
            scores |= future.result()
        return scores


@lru_cache(maxsize=4)
def load_rewards(spec: RewardSpec) -> Rewards:
    """The rewards that ``spec`` names, loaded once per process.

    Raises:
        ConfigError: no such reward, one that cannot be called, or metrics that cannot be told apart.
    """
    given = [item for part in spec.rewards.split(",") if (item := part.strip())]
    urls = [item.removeprefix("remote:") for item in given if item.startswith("remote:")]
    named = [item for item in given if not item.startswith("remote:")]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise ConfigError(f"{FLAG} {twice[0].partition('@')[0]}: given twice; leave one out")
    further = [_load(name, spec) for name in named]
    if urls:
        from openrlhf_gopo.rewards.remote import RemoteReward

        remote = RemoteReward(urls, spec.timeout)
        further.append(Reward(f"remote:{remote.shown}", "remote", remote, asks=True))
    return Rewards(further, spec.timeout)


def _load(name: str, spec: RewardSpec) -> Reward:
    if name.startswith("judge:"):
        from openrlhf_gopo.rewards.judge import Judge

        judge = Judge.from_name(FLAG, name, spec.judge, spec.timeout)
        return Reward(f"judge:{judge.endpoint.model}@{judge.endpoint.url}", "judge", judge, asks=True)
    return Reward(name, name.rpartition(":")[2], find_callable(FLAG, name, ENTRY_POINTS, "reward", OTHERS))
