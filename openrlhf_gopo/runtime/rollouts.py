"""Batches of dialogues for the trainer: one when it asks, or made ahead while it learns (--train.async_enable)."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openrlhf_gopo.runtime.checkpoints.random_states import random_states
from openrlhf_gopo.runtime.samples import DialogueSample
from openrlhf_gopo.runtime.samples_generator import GOPOSamplesGenerator
from openrlhf_gopo.types import Trajectory


@dataclass(frozen=True)
class Snapshot:
    """Where the rollouts stood after a batch: a run that goes on from a checkpoint makes the next batch again.

    ``loader``: the data loader's state. ``random``: the driver's generators. ``samples``: the generator's counters.
    ``buffered``: dialogues played and not yet in a batch. ``logs``: bytes of trajectories.jsonl.
    """

    loader: dict[str, Any]
    random: dict[str, Any]
    samples: dict[str, Any]
    buffered: list[Trajectory]
    logs: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """Samples of one step. ``episode``: the pass over the goals that the next batch belongs to.

    ``consumed``: goals used so far. ``seconds``: how long the dialogues took. ``pass_rate``: of dynamic filtering.
    """

    samples: list[DialogueSample]
    pass_rate: float | None
    episode: int
    consumed: int
    seconds: float
    snapshot: Snapshot


class Rollouts:
    """Batches from ``episode`` on, ``consumed`` goals in, to the end of the last pass."""

    def __init__(self, generator: GOPOSamplesGenerator, episode: int, consumed: int) -> None:
        self.generator, self.args = generator, generator.args
        self.episode, self.consumed = episode, consumed
        self.rolling = threading.Lock()  # held while dialogues of a batch, or of an evaluation, are played

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        size = self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt
        while self.episode < self.args.train.num_episodes:
            with self.rolling:
                start = time.time()
                samples, rate, used, exhausted = self.generator.generate_samples(
                    temperature=self.args.rollout.temperature
                )
                self.consumed += used
                self.episode += exhausted
                seconds, snapshot = time.time() - start, self._snapshot()
            if len(samples) == size:  # else the remainder of a pass: dropped, as drop_last in upstream's loader does
                yield Batch(samples, rate, self.episode, self.consumed, seconds, snapshot)

    def _snapshot(self) -> Snapshot:
        log, generator = self.generator.trajectories, self.generator
        return Snapshot(
            loader=generator.prompts_dataloader.state_dict(),
            random=random_states(),
            samples=generator.state(),
            buffered=generator.buffered,
            logs={log.name: log.stat().st_size if log.is_file() else 0},
        )


class RolloutsAhead(Rollouts):
    """Made by a thread of their own, at most ``--train.async_queue_size`` batches before the one that is learned.

    So no sample is trained on after more than that many updates since its dialogue began.
    """

    def __init__(self, generator: GOPOSamplesGenerator, episode: int, consumed: int) -> None:
        super().__init__(generator, episode, consumed)
        self._slots = threading.Semaphore(self.args.train.async_queue_size)
        self._ready: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._over = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        """Raises what the thread raised, at the batch that it could not make."""
        threading.Thread(target=self._produce, name="gopo-rollouts", daemon=True).start()
        try:
            while (made := self._ready.get()) is not None:
                if isinstance(made, BaseException):
                    raise made
                self._slots.release()  # the next batch may begin while this one is learned
                yield made
        finally:
            self._over.set()
            self._slots.release()

    def _produce(self) -> None:
        try:
            batches = self._batches()
            while self._slots.acquire() and not self._over.is_set():
                batch = next(batches, None)
                self._ready.put(batch)
                if batch is None:
                    return
        except BaseException as error:  # whatever it is, it belongs to the trainer's thread
            self._ready.put(error)
