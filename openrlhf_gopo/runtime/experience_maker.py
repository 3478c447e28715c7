"""From dialogues to advantages: the preference loss for the expert, upstream's estimators for the responder."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from openrlhf_gopo.config import PreferenceConfig
from openrlhf_gopo.core.preference import decision_advantages, preference_coefficients, turn_weights
from openrlhf_gopo.runtime.samples import DialogueSample, to_experience


class GOPOExperienceMaker(RemoteExperienceMaker):
    """Upstream's maker for one role of two-level dialogues; by itself it is the responder's.

    ``metrics`` holds what the last batch showed, for the log.
    """

    def __init__(self, *args: Any, role: str, num_labels: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.role, self.num_labels = role, num_labels
        self.metrics: dict[str, float] = {}

    def make_experience_batch(self, samples: list[DialogueSample]) -> list[Experience]:
        """Experiences in upstream's micro-batches. A group is contiguous, so it stays whole on one rank.

        A quarantined trajectory takes the mean return of the others of its group: no baseline moves by it, and its
        empty action mask gives it no gradient.
        """
        size = self.args.rollout.n_samples_per_prompt
        experiences = []
        for start in range(0, len(samples), size):
            group = [to_experience(s, self.role, self.num_labels) for s in samples[start : start + size]]
            kept = [e.rewards for e in group if not e.info["quarantined"]]
            mean = torch.cat(kept).mean() if kept else torch.zeros(())
            for experience in group:
                if experience.info["quarantined"]:
                    experience.rewards = mean.reshape(1)
            experiences += group
        return super().make_experience_batch(experiences)

    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """Upstream's forward passes. A sample without actions has mean KL 0, not 0/0."""
        experiences = super().make_experience(samples_list)
        for experience in experiences:
            for key in ("kl", "logprobs_diff"):
                experience.info[key] = experience.info[key].nan_to_num(0.0)
        return experiences


class ExpertExperienceMaker(GOPOExperienceMaker):
    """The expert's maker: advantages are the preference coefficients of whole trajectories, spread over decisions."""

    def __init__(self, *args: Any, preference: PreferenceConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preference = preference
        self._reference_refs: list = []

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> list:
        refs = super()._dispatch_forward(group, sync_condition, **kwargs)
        if group is self.initial_model_group:
            self._reference_refs = refs  # upstream drops these log-probabilities unless KL is a loss
        return refs

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Advantages (B, A) of the decisions, zero elsewhere, from the trust-region form of the preference loss.

        c_i at the sampler's parameters, spread by w_t and scaled to unit root mean square over the batch, minus the
        KL penalty to go (when KL is not a loss) as upstream subtracts it from its rewards.
        """
        pref = self.preference
        order = torch.tensor([i for e in experiences for i in e.index])
        masks = [row.bool() for e in experiences for row in e.action_mask]
        counts = torch.tensor([int(mask.sum()) for mask in masks])
        weights = torch.cat([turn_weights(int(n), mode=pref.weights, discount=pref.discount) for n in counts])
        owner = torch.repeat_interleave(torch.arange(len(masks)), counts)
        ratios = self._log_ratios(experiences, masks).double()
        log_ratios = torch.zeros(len(masks), dtype=torch.float64).index_add(0, owner, weights * ratios)
        returns = torch.cat([e.rewards for e in experiences])
        quarantined = torch.cat([e.info["quarantined"] for e in experiences]).bool()
        group_of = order // self.args.rollout.n_samples_per_prompt
        groups = [((group_of == g) & ~quarantined).nonzero().flatten() for g in group_of.unique()]
        coefficients, self.metrics = preference_coefficients(
            log_ratios,
            returns,
            groups,
            pairing=pref.pairing,
            beta=pref.beta,
            margin=pref.margin,
            label_smoothing=pref.label_smoothing,
            offset=pref.offset,
        )
        advantages = decision_advantages(coefficients, owner, weights).split(counts.tolist())
        self._attach(experiences, masks, advantages)
        return experiences

    def _log_ratios(self, experiences: list[Experience], masks: list[torch.Tensor]) -> torch.Tensor:
        """log pi - log pi_ref of every decision of the batch, (N,): zero when the sampler is the reference."""
        current = [row for e in experiences for row in e.action_log_probs]
        if self.preference.reference == "sampler":
            reference = current
        else:
            copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
            reference = [row for batch in self._flatten_results(self._reference_refs, copies) for row in batch]
        return torch.cat([(c - r)[mask] for c, r, mask in zip(current, reference, masks, strict=True)])

    def _attach(self, experiences: list[Experience], masks: list[torch.Tensor], advantages: Any) -> None:
        rows = iter(zip(masks, advantages, strict=True))
        for experience in experiences:
            experience.advantages = torch.zeros_like(experience.action_log_probs, dtype=torch.float32)
            for row in range(len(experience.advantages)):
                mask, values = next(rows)
                penalty = self.kl_ctl.value * experience.kl[row][mask].flip(0).cumsum(0).flip(0)
                experience.advantages[row][mask] = (values - penalty).float()
            experience.returns = experience.advantages.clone()
            experience.info["return"] = experience.rewards
            experience.kl = None
