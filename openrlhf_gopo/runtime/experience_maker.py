"""From dialogues to advantages: what both roles share, and upstream's estimators for the responder.

Whatever is one number per action is computed here on the actions alone, in float64, and scattered into upstream's
padded tensors at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from openrlhf.trainer.ppo_utils import experience_maker
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from openrlhf.utils.logging_utils import init_logger

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.core.categorical import turn_of_actions
from openrlhf_gopo.core.turn_level import gae, returns_to_go, turn_advantages
from openrlhf_gopo.runtime.models import substituted
from openrlhf_gopo.runtime.samples import DialogueSample, to_experience

MISMATCH = 0.02  # mean |log pi| difference that rounding in bf16 stays below
logger = init_logger(__name__)


@dataclass
class Batch:
    """The actions of a rollout in upstream's order of experiences, dialogue after dialogue.

    ``masks``: per dialogue (A,), True at its actions. ``counts``: actions (tokens) of each. ``turns``: per dialogue
    (count,), the decision that each action belongs to. ``groups``: LongTensors, the indices of dialogues of one goal;
    quarantined ones are in none.
    """

    samples: list[DialogueSample]
    masks: list[torch.Tensor]
    counts: list[int]
    turns: list[torch.Tensor]
    groups: list[torch.Tensor]

    def gather(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """One value per action, (N,) float64, from rows (A,)."""
        return torch.cat([row[mask] for row, mask in zip(rows, self.masks, strict=True)]).double()


class GOPOExperienceMaker(RemoteExperienceMaker):
    """Upstream's maker for one role of two-level dialogues. ``metrics``: what the last batch showed, for the log."""

    def __init__(self, *args: Any, role: str, num_labels: int, config: GopoConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.role, self.num_labels, self.config = role, num_labels, config
        self.metrics: dict[str, float] = {}
        self._samples: list[DialogueSample] = []

    def make_experience_batch(self, samples: list[DialogueSample]) -> list[Experience]:
        """Experiences in upstream's micro-batches. A group is contiguous, so it stays whole on one rank."""
        self._samples = samples
        return super().make_experience_batch([to_experience(s, self.role, self.num_labels) for s in samples])

    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """Upstream's forward passes. A sample without actions has mean KL 0, not 0/0."""
        experiences = super().make_experience(samples_list)
        for experience in experiences:
            for key in ("kl", "logprobs_diff"):
                experience.info[key] = experience.info[key].nan_to_num(0.0)
        self.compare_with_sampler(experiences)
        return experiences

    def compare_with_sampler(self, experiences: list[Experience]) -> None:
        """Metrics ``sampler_mismatch`` and ``sampler_mismatch_max``: the mean and the largest |log pi| difference
        between sampler (vLLM) and trainer over all actions. Warns when the two compute different policies."""
        rows = [(e.rollout_log_probs - e.action_log_probs.float()).abs()[e.action_mask.bool()] for e in experiences]
        apart = torch.cat(rows)
        mean, largest = (float(apart.mean()), float(apart.max())) if len(apart) else (0.0, 0.0)
        self.metrics = {"sampler_mismatch": mean, "sampler_mismatch_max": largest}
        if mean > MISMATCH and not self.args.train.async_enable:
            logger.warning(
                f"{self.role}/sampler_mismatch {mean:.2g} is above {MISMATCH}, its largest {largest:.2g}: vLLM samples "
                "from another policy than the one that learns; see docs/tuning.md"
            )

    def _batch(self, experiences: list[Experience]) -> Batch:
        order = [int(i) for e in experiences for i in e.index]
        masks = [row.bool() for e in experiences for row in e.action_mask]
        size = self.args.rollout.n_samples_per_prompt
        goals = torch.tensor([i // size for i in order])
        quarantined = torch.tensor([self._samples[i].quarantined for i in order])
        groups = [((goals == goal) & ~quarantined).nonzero().flatten() for goal in goals.unique()]
        turns = [turn_of_actions(given["allowed"]) for e in experiences for given in e.mm_train_inputs]
        return Batch([self._samples[i] for i in order], masks, [int(mask.sum()) for mask in masks], turns, groups)

    def _impute(self, experiences: list[Experience]) -> None:
        """A quarantined trajectory takes the mean reward of the others of its group, and 0 where there are none.

        So no mean moves by it (a group's standard deviation shrinks, by 7% with one of 8), and its empty action mask
        gives it no gradient.
        """
        size = self.args.rollout.n_samples_per_prompt
        goals = torch.tensor([int(i) // size for e in experiences for i in e.index])
        failed = torch.cat([e.info["quarantined"] for e in experiences]).bool()
        rewards = torch.cat([e.rewards for e in experiences])
        for goal in goals[failed].unique():
            kept = rewards[(goals == goal) & ~failed]
            rewards[(goals == goal) & failed] = kept.mean() if len(kept) else 0.0
        for experience, mine in zip(experiences, rewards.split([len(e.index) for e in experiences]), strict=True):
            experience.rewards, experience.info["reward"] = mine, mine.clone()

    def _kl_penalties(self, experiences: list[Experience], batch: Batch) -> torch.Tensor:
        """What upstream subtracts from the reward of each action, (N,); zeros where KL is a loss."""
        return self.kl_ctl.value * batch.gather([row for e in experiences for row in e.kl])

    def _attach(
        self, experiences: list[Experience], batch: Batch, values: torch.Tensor, returns: torch.Tensor | None
    ) -> None:
        """Scatter advantages and critic targets, (N,) actions each; without a critic the targets are zeros."""
        returns = torch.zeros_like(values) if returns is None else returns
        rows = zip(batch.masks, values.split(batch.counts), returns.split(batch.counts), strict=True)
        for experience in experiences:
            experience.advantages = torch.zeros_like(experience.action_log_probs, dtype=torch.float32)
            experience.returns = torch.zeros_like(experience.advantages)
            for row in range(len(experience.advantages)):
                mask, advantage, target = next(rows)
                experience.advantages[row][mask] = advantage.float()
                experience.returns[row][mask] = target.float()
            experience.info["return"] = experience.rewards
            experience.kl = None


class ResponderExperienceMaker(GOPOExperienceMaker):
    """The responder's maker: upstream's estimators, on one return per trajectory or on what every turn earned."""

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Upstream's, or with ``--gopo.credit turn``: every reply's reward at its last token, returns to go.

        gae runs over action tokens only, so that the user's words between two replies discount nothing; the other
        estimators subtract their baseline from each turn's return to go (``core.turn_level.turn_advantages``), and all
        tokens of the reply get the result, less the KL penalty to go. As upstream, reinforce alone discounts (here from
        reply to reply), and whitening comes last. --reward.clip_range bounds every turn's reward; upstream's length
        penalties, one per trajectory, are refused.
        """
        if self.config.credit == "trajectory":
            return self._upstreams(experiences)
        self._impute(experiences)
        batch = self._batch(experiences)
        penalties = self._kl_penalties(experiences, batch)
        of_spans = [sample.turns_of_spans(self.role) for sample in batch.samples]
        lengths = [[end - start for start, end in spans_of(sample, self.role)] for sample in batch.samples]
        tokens = torch.tensor([n for row in lengths for n in row], dtype=torch.long)
        low, high = self.args.reward.clip_range
        earned = [[min(max(r, low), high) for r in sample.earned[self.role]] for sample in batch.samples]
        estimator, gamma = self.args.algo.advantage.estimator, self.args.algo.advantage.gamma
        if estimator == "gae":
            at_spans = [r for turns, row in zip(of_spans, earned, strict=True) for r in _at_last_spans(turns, row)]
            rewards = -penalties
            rewards[tokens.cumsum(0) - 1] += torch.tensor(at_spans, dtype=torch.float64)
            values = batch.gather([row for e in experiences for row in e.values])
            advantages = gae(rewards, values, batch.counts, gamma=gamma, lambd=self.args.algo.advantage.lambd)
            self._attach(experiences, batch, _whiten(advantages, self.args), advantages + values)
            return experiences
        gamma = gamma if estimator == "reinforce" else 1.0
        by_turn = turn_advantages(earned, batch.groups, estimator=estimator, gamma=gamma)
        of_each = torch.cat([row[turns] for row, turns in zip(by_turn, of_spans, strict=True)])
        advantages = torch.repeat_interleave(of_each, tokens) - returns_to_go(penalties, batch.counts)
        if estimator in ("reinforce", "reinforce_baseline"):
            advantages = _whiten(advantages, self.args)
        self._attach(experiences, batch, advantages, advantages)
        return experiences

    def _upstreams(self, experiences: list[Experience]) -> list[Experience]:
        """Upstream's estimators; quarantined trajectories take their mean after its length penalties."""

        def penalties(made: list[Experience], args: Any) -> None:
            apply_length_penalties(made, args)
            self._impute(made)

        with substituted(experience_maker, apply_length_penalties=penalties):
            return super().compute_advantages_and_returns(experiences)


def spans_of(sample: DialogueSample, role: str) -> list[tuple[int, int]]:
    """Where the actions of ``role`` stand in its stream; none of a quarantined dialogue."""
    return [] if sample.quarantined else sample.trajectory.streams[role].spans


def _at_last_spans(turns: list[int], earned: list[float]) -> list[float]:
    """What each span earned: the reward of its turn at the last span of it, a reply's; nothing elsewhere."""
    following = [*turns[1:], None]
    return [earned[t] if t < len(earned) and t != after else 0.0 for t, after in zip(turns, following, strict=True)]


def _whiten(advantages: torch.Tensor, args: Any) -> torch.Tensor:
    """As upstream: zero mean over the batch's actions and, unless --algo.advantage.no_std_norm, unit variance."""
    centred = advantages - advantages.mean()
    return centred if args.algo.advantage.no_std_norm else centred * centred.pow(2).mean().clamp(min=1e-8).rsqrt()
