"""``--gopo.pref.trust_region exact``: the gradient of the written preference loss at every optimizer step.

Upstream reads its replay buffer through a shuffled ``DataLoader``, sample by sample (ppo_actor.py:153 of 0.11.2).
Here the loader hands out whole groups instead, and before each optimizer step it brings that step's samples up to
date: log pi becomes the current one, so upstream's ratio is 1 and never clipped, and the advantages become N c_i w_t
with N the actions of the step over all ranks, so that upstream's token mean has the gradient of L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch
from openrlhf.trainer.ray import ppo_actor

from openrlhf_gopo.config import PreferenceConfig
from openrlhf_gopo.core.categorical import turn_of_actions
from openrlhf_gopo.core.preference import action_weights, preference_coefficients
from openrlhf_gopo.runtime.models import RolePPOTrainer, substituted


class ExactPreferenceTrainer(RolePPOTrainer):
    """The expert's optimizer with coefficients that are recomputed before every step. Groups are whole on each rank."""

    def ppo_train(self, kl_ctl: float) -> dict[str, Any]:
        """Upstream's loop over whole groups. What the experience maker left in ``advantages`` is added to the
        preference term: the KL penalty, the turn-level term."""
        items = self.replay_buffer.items
        pref: PreferenceConfig = self.args.preference
        initial = pref.reference == "initial"
        self._fixed = {
            id(item): (item.base_action_log_probs if initial else item.action_log_probs, item.advantages)
            for item in items
        }
        self._updated = False

        def loader(_buffer: Any, *, batch_size: int, collate_fn: Callable, **_options: Any) -> OptimizerSteps:
            return OptimizerSteps(items, batch_size, self.strategy.accumulated_gradient, collate_fn, self.refresh)

        with substituted(ppo_actor, DataLoader=loader):
            return super().ppo_train(kl_ctl)

    @torch.no_grad()
    def refresh(self, items: list[Experience]) -> None:
        """Set ``action_log_probs`` and ``advantages`` of one optimizer step's samples, at the current parameters.

        The first step after a rollout pays no forward pass: its log-probabilities are those of the rollout.
        """
        pref: PreferenceConfig = self.args.preference
        if self._updated:
            self._forward(items)
        self._updated = True
        masks = [item.action_mask.bool() for item in items]
        turns = [turn_of_actions(item.mm_train_inputs[0]["allowed"]) for item in items]
        weights = [action_weights(turn, mode=pref.weights, discount=pref.discount) for turn in turns]
        log_ratios = torch.stack(
            [
                (w * (item.action_log_probs - self._fixed[id(item)][0])[mask].double()).sum()
                for item, mask, w in zip(items, masks, weights, strict=True)
            ]
        )
        coefficients = self._coefficients(items, log_ratios)
        actions = self.strategy.all_reduce(float(sum(mask.sum() for mask in masks)), op="sum")
        for item, mask, c, w in zip(items, masks, coefficients, weights, strict=True):
            item.advantages = self._fixed[id(item)][1].clone()
            item.advantages[mask] += (pref.coef * actions * c * w).float()

    def _coefficients(self, items: list[Experience], log_ratios: torch.Tensor) -> torch.Tensor:
        """c_i of L as a mean over the comparisons of all ranks, (M,) float64."""
        pref: PreferenceConfig = self.args.preference
        coefficients, metrics = preference_coefficients(
            log_ratios,
            torch.stack([item.rewards for item in items]),
            [
                torch.tensor([i for i in group if not items[i].info["quarantined"]], dtype=torch.long)
                for group in goals(items)
            ],
            **pref.loss_options,
        )
        everywhere = self.strategy.all_reduce(metrics["pref_terms"], op="sum")
        return coefficients * metrics["pref_terms"] / max(everywhere, 1.0)

    def _forward(self, items: list[Experience]) -> None:
        self.actor.eval()  # training_step switches back
        size = self.replay_buffer.sample_batch_size
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            batch = make_experience_batch(chunk).to_device(torch.cuda.current_device())
            with self.actor.choosing(batch.mm_train_inputs):
                logprobs = self.actor(batch.sequences, batch.action_mask, batch.attention_mask).float().cpu()
            for item, row in zip(chunk, logprobs, strict=True):
                item.action_log_probs = row[: len(item.action_mask)]


class OptimizerSteps:
    """In place of upstream's ``DataLoader``: micro-batches of samples, whole groups to an optimizer step.

    Groups are shuffled anew in every pass; a last step that is not full is dropped, as upstream's ``drop_last`` does.
    """

    def __init__(
        self,
        items: list[Experience],
        batch_size: int,
        accumulated_gradient: int,
        collate_fn: Callable[[list[Experience]], Experience],
        prepare: Callable[[list[Experience]], None],
    ) -> None:
        self.items, self.batch_size, self.collate_fn, self.prepare = items, batch_size, collate_fn, prepare
        self.step = batch_size * max(int(accumulated_gradient), 1)

    def __len__(self) -> int:
        return len(self.items) // self.step * (self.step // self.batch_size)

    def __iter__(self) -> Iterator[Experience]:
        groups = goals(self.items)
        order = [i for g in torch.randperm(len(groups)).tolist() for i in groups[g]]
        for start in range(0, len(order) - self.step + 1, self.step):
            items = [self.items[i] for i in order[start : start + self.step]]
            self.prepare(items)
            for first in range(0, self.step, self.batch_size):
                yield self.collate_fn(items[first : first + self.batch_size])


def goals(items: list[Experience]) -> list[list[int]]:
    """Indices of the samples of each goal, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.prompts[0], []).append(i)
    return list(groups.values())
