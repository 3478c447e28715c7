"""The credit term ``q`` inside the expert's actor, where the hidden states and the probabilities of all labels are.

Before the first optimizer step of a rollout one forward pass over its dialogues gives the hidden state and the
log-probabilities of all allowed labels at every decision; Q is fitted to the decisions of the last ``MEMORY`` rollouts
(``core.q``). Its advantages travel with the samples beside their allowed labels, and the term is added to upstream's
policy loss, in upstream's own normalisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.models.loss import aggregate_loss
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch
from openrlhf.utils.loss_utils import _get_dp_group

from openrlhf_gopo.core.categorical import PAD
from openrlhf_gopo.core.q import explained, fit_q, mean_square, q_advantages, q_surrogate
from openrlhf_gopo.runtime.models import RolePPOTrainer

MEMORY = 8  # rollouts whose decisions Q is fitted to


class QCreditTrainer(RolePPOTrainer):
    """The expert's optimizer with the term ``q`` of weight ``args.q_weight`` in its loss.

    ``memory``: of each of the last rollouts the hidden states (N, d), chosen labels (N,) and returns to go (N,) of all
    data-parallel ranks. The samples carry ``togo`` (N,) in ``Experience.mm_train_inputs``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_term()

    def add_term(self) -> None:
        """Put the term into the loss; nothing is remembered yet."""
        self.memory: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.actor_loss_fn = LossWithQ(self.actor_loss_fn, self.actor, self.args)

    def ppo_train(self, kl_ctl: float) -> dict[str, Any]:
        """Upstream's loop, after Q has been fitted; its metrics with ``q_r2`` and ``q_fit_r2`` (``core.q.explained``):
        of this rollout before Q has seen it, and after. Replies of a model in both roles are no decisions."""
        metrics = self._judge([item for item in self.replay_buffer.items if "togo" in item.mm_train_inputs[0]])
        return {**super().ppo_train(kl_ctl), **metrics}

    @torch.no_grad()
    def _judge(self, items: list[Experience]) -> dict[str, float]:
        """Give every decision of ``items`` its advantages and old log-probabilities, (N, L) each."""
        if not items:
            return {}
        found = self._states(items)
        rows = [_rows(item, hidden, logprobs) for item, (hidden, logprobs) in zip(items, found, strict=True)]
        mine = tuple(torch.cat(part) for part in zip(*rows, strict=True))
        everyone = self._gather(mine)
        hidden, chosen, togo = everyone
        metrics: dict[str, float] = {}
        if len(togo) == 0:
            return metrics
        if self.memory:
            before = fit_q(*map(torch.cat, zip(*self.memory, strict=True))).values(hidden, chosen.unsqueeze(1))
            metrics["q_r2"] = explained(before.squeeze(1), togo)
        self.memory = [*self.memory, everyone][-MEMORY:]
        q = fit_q(*map(torch.cat, zip(*self.memory, strict=True)))
        metrics["q_fit_r2"] = explained(q.values(hidden, chosen.unsqueeze(1)).squeeze(1), togo)
        total = torch.zeros(1, dtype=torch.float64)
        for item, (states, logprobs) in zip(items, found, strict=True):
            inputs = item.mm_train_inputs[0]
            valid = inputs["allowed"] != PAD
            advantages = q_advantages(q.values(states, inputs["allowed"]), logprobs, valid)
            total += mean_square(advantages, logprobs, valid)
            inputs["q_advantages"], inputs["q_logprobs"] = advantages, logprobs.float()
        scale = float(self._gather((total,))[0].sum() / len(togo)) ** 0.5
        for item in items:
            inputs = item.mm_train_inputs[0]
            inputs["q_advantages"] = (inputs["q_advantages"] / max(scale, 1e-12)).float()
        return metrics

    def _states(self, items: list[Experience]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states (N, d) and label log-probabilities (N, L) of the actions of each item, on the CPU."""
        self.actor.eval()  # training_step switches back
        size, found = self.replay_buffer.sample_batch_size, []
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            batch = make_experience_batch(chunk).to_device(torch.cuda.current_device())
            counts = [int(item.action_mask.sum()) for item in chunk]
            with self.actor.choosing(batch.mm_train_inputs):
                self.actor(batch.sequences, batch.action_mask, batch.attention_mask)
                hidden, logprobs = self.actor.states.float().cpu(), self.actor.label_logprobs.float().cpu()
            found += zip(hidden.split(counts), logprobs.split(counts), strict=True)
        return found

    def _gather(self, mine: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The rows of all data-parallel ranks, in the order of ranks."""
        group = _get_dp_group(self.strategy)
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return mine
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine, group=group)
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def save_memory(self, path: Path) -> None:
        """Write the decisions of the last rollouts."""
        torch.save(self.memory, path)

    def load_memory(self, path: Path) -> None:
        """Read them back; a checkpoint from before the term was used has none."""
        if path.is_file():
            self.memory = torch.load(path, weights_only=True)


class LossWithQ:
    """Upstream's policy loss plus the term of weight ``args.q_weight``, averaged over actions as upstream averages."""

    def __init__(self, policy_loss: Any, actor: Any, args: Any) -> None:
        self.policy_loss, self.actor, self.weight = policy_loss, actor, args.q_weight
        self.clip = tuple(args.actor.eps_clip_low_high)
        self.token_level_loss: bool = policy_loss.token_level_loss

    def __call__(self, log_probs: torch.Tensor, *args: Any, action_mask: torch.Tensor, **options: Any) -> tuple:
        loss, *rest = self.policy_loss(log_probs, *args, action_mask=action_mask, **options)
        inputs = self.actor.inputs
        if not len(inputs.get("q_advantages", ())):
            return loss, *rest
        valid = inputs["allowed"] != PAD
        logprobs = self.actor.label_logprobs
        each = q_surrogate(logprobs, inputs["q_logprobs"], inputs["q_advantages"], valid, self.clip)
        mask = action_mask.bool()
        spread = each.new_zeros(mask.shape).masked_scatter(mask, each)
        info = {k: options[k] for k in ("dp_size", "batch_num_tokens", "global_batch_size") if k in options}
        return loss + self.weight * aggregate_loss(spread, mask, self.token_level_loss, **info), *rest


def _rows(item: Experience, hidden: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Hidden state, chosen label and return to go of the decisions of one sample; words of plans are none."""
    inputs, mask = item.mm_train_inputs[0], item.action_mask.bool()
    decision = (inputs["allowed"] != PAD).any(dim=1)
    columns = mask.nonzero().flatten() + len(item.sequences) - len(mask)
    return hidden[decision], item.sequences[columns][decision].cpu(), inputs["togo"][decision].double()
