"""Logged dialogues as what ``train_gopo_offline`` learns from: streams, decisions, returns, groups."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from openrlhf_gopo.config import EXPERT
from openrlhf_gopo.core.categorical import pad_allowed
from openrlhf_gopo.core.offline import Units, alike, better, chunked, supported
from openrlhf_gopo.core.preference import TIE, turn_weights
from openrlhf_gopo.envs import Environment
from openrlhf_gopo.envs.base import SPLITS
from openrlhf_gopo.errors import DataError
from openrlhf_gopo.logs import Dialogue, measured, read, to_trajectory
from openrlhf_gopo.logs.check import fits
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.rewards.joint import joint, parse_weights
from openrlhf_gopo.runtime.offline.config import RETURNS, OfflineConfig
from openrlhf_gopo.types import StopReason, Stream, Trajectory


@dataclass
class Sample:
    """One logged dialogue in the stream of the role that learns.

    ``tokens`` (S,); ``mask`` (S-1,), True where the next token is an action; of the N actions: ``allowed`` (N, L) label
    ids, L = 0 for the responder; ``unit`` (N,), which of ``keys`` it belongs to; ``weights`` (N,) float64. Units of one
    key are compared: "" is the whole dialogue, else a reply's strategy. ``reference`` (N,): log pi_ref.
    """

    name: str
    group: str
    returned: float
    tokens: torch.Tensor
    mask: torch.Tensor
    allowed: torch.Tensor
    unit: torch.Tensor
    weights: torch.Tensor
    keys: list[str]
    better: bool = False
    reference: torch.Tensor | None = None


class Logs:
    """Reads files of logged dialogues for one role; ``max_len``: ``--data.max_len``, tokens of a stream."""

    def __init__(self, env: Environment, policy: TwoLevelPolicy, config: OfflineConfig, max_len: int) -> None:
        self.env, self.policy, self.config, self.max_len = env, policy, config, max_len
        self._fits, self._weights = fits(env), parse_weights(config.reward, RETURNS)
        goals = [goal for split in SPLITS for goal in env.goals(split)]
        self._catalogues = {goal.intent: env.catalogue(goal) for goal in goals}

    def training(self, path: str) -> tuple[list[Sample], Counter[str]]:
        """The dialogues to learn from, under the support guard, and a census of what was left out and why.

        Dialogues about held-out goals of the environment are left out.

        Raises:
            DataError: the file breaks the schema or does not fit the environment, or holds nothing to learn from.
        """
        census: Counter[str] = Counter()
        found = self._read(path, census, {goal.id for goal in self.env.goals("heldout")})
        if self.config.role == EXPERT and self.config.support:
            decisions = [(t.goal.intent, turn.strategy) for t, _ in found for turn in t.turns if turn.strategy]
            support = supported(decisions, self.config.support)
            for trajectory, _ in found:
                self._guard(trajectory, support.get(trajectory.goal.intent, frozenset()), census)
        samples = self._samples(path, found, census)
        if not self.config.imitation:
            samples = self._comparable(samples, census)
        if not samples:
            told = "; ".join(f"{reason}: {count}" for reason, count in census.items())
            raise DataError(f"--data.dataset {path}: nothing to learn from ({told})")
        return samples, census

    def heldout(self, path: str) -> tuple[list[Sample], Counter[str]]:
        """The dialogues to judge a model by: every one, on all that was allowed.

        Raises:
            DataError: as ``training``.
        """
        census: Counter[str] = Counter()
        samples = self._samples(path, self._read(path, census, set()), census)
        if not samples:
            raise DataError(f"--eval.dataset {path}: no dialogue of which a decision could be judged")
        return samples, census

    def _read(self, path: str, census: Counter[str], heldout: set[str]) -> list[tuple[Trajectory, float]]:
        """Dialogues with their returns."""
        found = []
        for _, dialogue in read(path, self._fits):
            trajectory, returned = to_trajectory(dialogue), self._return(dialogue)
            if trajectory.stop is StopReason.FAILED:
                census["left out: failed"] += 1
            elif trajectory.goal.id in heldout:
                census["left out: held-out goal"] += 1
            elif math.isnan(returned):
                census[f"left out: no {self.config.reward} in the log"] += 1
            else:
                found.append((trajectory, returned))
        return found

    def _return(self, dialogue: Dialogue) -> float:
        rating = dialogue.outcome.rating
        told = measured(to_trajectory(dialogue)) | {"rating": math.nan if rating is None else rating}
        return joint(told, self._weights)

    def _guard(self, trajectory: Trajectory, support: frozenset[str], census: Counter[str]) -> None:
        """Restrict every turn to ``support``; a choice outside of it becomes context, as a forced one is."""
        everything = tuple(s.id for s in self._catalogues[trajectory.goal.intent])
        for turn in trajectory.turns:
            allowed = turn.allowed or everything
            if turn.strategy in support:
                kept = tuple(s for s in allowed if s in support)
                # What the SOP forbade is no decision either: were nothing left, all would seem allowed.
                turn.allowed, turn.forced = kept, turn.forced or len(kept) <= 1 or turn.strategy not in kept
            elif turn.strategy in allowed and not turn.forced:
                census["decisions left out: too rare in the logs"] += 1
                turn.forced = True

    def _samples(self, path: str, found: list[tuple[Trajectory, float]], census: Counter[str]) -> list[Sample]:
        """Those of ``found`` that hold an action and fit, grouped."""
        groups = self._groups([trajectory for trajectory, _ in found])
        kept = better(groups, [returned for _, returned in found], self.config.keep)
        samples = []
        for number, group in enumerate(groups):
            for index in group:
                trajectory, returned = found[index]
                stream = self.policy.replay(trajectory, self._catalogues[trajectory.goal.intent])[self.config.role]
                if len(stream.tokens) > self.max_len:
                    census[f"left out: longer than --data.max_len {self.max_len}"] += 1
                elif not stream.spans:
                    census["left out: nothing to decide or say"] += 1
                else:
                    samples.append(self._sample(trajectory, returned, stream, f"{number}", index in kept))
                    self._count(trajectory, census)
        return samples

    def _groups(self, trajectories: list[Trajectory]) -> list[list[int]]:
        """Indices of dialogues that may be compared."""
        by_key: dict[str, list[int]] = defaultdict(list)
        for index, trajectory in enumerate(trajectories):
            goal = trajectory.goal
            by_key[goal.intent if self.config.group == "intent" else goal.id].append(index)
        groups = []
        for members in by_key.values():
            goals = [trajectories[index].goal for index in members]
            near = alike([frozenset(g.subgoals) | frozenset(g.facts) for g in goals], self.config.similarity)
            groups += [[members[i] for i in part] for part in near]
        return groups

    def _sample(self, trajectory: Trajectory, returned: float, stream: Stream, group: str, kept: bool) -> Sample:
        tokens = torch.tensor(stream.tokens)
        mask = torch.zeros(len(tokens), dtype=torch.bool)
        for start, end in stream.spans:
            mask[start:end] = True
        lengths = [end - start for start, end in stream.spans]
        pref = self.config.pref
        if self.config.role == EXPERT:
            keys, unit = [""], torch.zeros(len(lengths), dtype=torch.long)
            weights = turn_weights(len(lengths), mode=pref.weights)
        else:
            keys = [turn.strategy for turn in trajectory.turns if turn.strategy]
            unit = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(lengths))
            weights = torch.cat([turn_weights(n, mode=pref.weights) for n in lengths])
        allowed = pad_allowed(stream.allowed, len(self.policy.labels) if self.config.role == EXPERT else 0)
        name = trajectory.goal.id
        return Sample(name, group, returned, tokens, mask[1:], allowed, unit, weights, keys, kept)

    def _count(self, trajectory: Trajectory, census: Counter[str]) -> None:
        """What became of the turns of a dialogue that is used."""
        for turn in trajectory.turns:
            if not turn.strategy:
                census["turns without a strategy"] += 1
            elif self.config.role == EXPERT and turn.allowed and turn.strategy not in turn.allowed:
                census["decisions left out: not allowed by the SOP"] += 1

    def _comparable(self, samples: list[Sample], census: Counter[str]) -> list[Sample]:
        """Without the groups in which no pair of returns differs."""
        groups: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            groups[sample.group].append(sample)
        kept = []
        for group in groups.values():
            returns = [sample.returned for sample in group]
            if max(returns) - min(returns) > TIE:
                kept += group
            else:
                census["groups without spread"] += 1
                census["left out: of a group without spread"] += len(group)
        return kept


class Chunks(Dataset):
    """Chunks of dialogues that are compared with each other, drawn anew in every epoch from (seed, epoch) alone."""

    def __init__(self, samples: Sequence[Sample], size: int, seed: int) -> None:
        self.samples, self.size, self.seed = samples, size, seed
        groups: dict[str, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            groups[sample.group].append(index)
        self.groups = list(groups.values())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the chunks of ``epoch``; their number never changes."""
        self.chunks = chunked(self.groups, self.size, random.Random(f"{self.seed}/{epoch}"))

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Sample]:
        return [self.samples[i] for i in self.chunks[index]]


def units(chunks: Sequence[Sequence[Sample]]) -> Units:
    """The units of a step's samples, in order; those of one chunk and one key are compared."""
    samples = [sample for chunk in chunks for sample in chunk]
    owner, returns, groups = [], list[float](), defaultdict[tuple[int, str], list[int]](list)
    for number, chunk in enumerate(chunks):
        for sample in chunk:
            owner.append(sample.unit + len(returns))
            for key in sample.keys:
                groups[number, key].append(len(returns))
                returns.append(sample.returned)
    return Units(
        owner=torch.cat(owner),
        weights=torch.cat([sample.weights for sample in samples]),
        returns=torch.tensor(returns, dtype=torch.float64),
        groups=[torch.tensor(group) for group in groups.values() if len(group) > 1],
        imitated=torch.cat([torch.full((len(s.unit),), s.better) for s in samples]),
    )
