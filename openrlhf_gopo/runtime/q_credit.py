"""The credit term ``q`` inside the expert's actor, where the hidden states and the probabilities of all labels are.

Before the first optimizer step of a rollout one forward pass over its dialogues gives the hidden state and the
log-probabilities of all allowed labels at every decision; Q is fitted to the decisions of the last ``MEMORY`` rollouts
(``core.q``). Its advantages travel with the samples beside their allowed labels, and the term is added to upstream's
policy loss, in upstream's own normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.models import PolicyLoss, aggregate_loss
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch

from openrlhf_gopo.core.categorical import PAD
from openrlhf_gopo.core.q import QFit, advantages, explained_variance, fit, surrogate
from openrlhf_gopo.runtime.models import RoleActor, RolePPOTrainer, substituted

MEMORY = 8  # rollouts whose decisions Q is fitted to


@dataclass
class Decisions:
    """Decisions of a rollout: ``states`` (N, d) float32, ``chosen`` (N,) token ids, ``togo`` (N,) returns to go."""

    states: torch.Tensor
    chosen: torch.Tensor
    togo: torch.Tensor

    def fitted(self) -> QFit:
        """Q of these decisions."""
        return fit(self.states, self.chosen, self.togo)

    def explained(self, q: QFit) -> float | None:
        """Share of the variance of the returns to go that ``q`` explains; None where they do not vary."""
        return explained_variance(q.values(self.states, self.chosen.unsqueeze(-1)).squeeze(-1), self.togo)


class QCreditTrainer(RolePPOTrainer):
    """The expert's optimizer with the term ``q`` of weight ``args.q_weight`` in its loss.

    The samples bring the return to go of each action's decision, ``togo`` (N,), in ``Experience.mm_train_inputs``.
    Those of a shared model's other role bring none, and are trained on as upstream does.

    ``memory``: the decisions of the last rollouts, of all data-parallel ranks, so that every rank fits the same Q.
    """

    memory: tuple[Decisions, ...] = ()
    _fitted: QFit | None = None  # to ``memory``; None also after a restart

    def ppo_train(self, kl_ctl: float) -> dict[str, Any]:
        """Upstream's loop, after Q has been fitted; its metrics and those of ``_credit``, and ``q_loss``, the mean of
        the term's loss over decisions and steps."""
        self._loss = QLoss(self.actor_loss_fn, self.actor, self.args.q_weight)
        metrics = self._credit(self.replay_buffer.items)
        status = super().ppo_train(kl_ctl)
        if metrics:
            sums = self.strategy.all_reduce({"loss": self._loss.total, "decisions": self._loss.decisions}, op="sum")
            metrics["q_loss"] = sums["loss"] / max(sums["decisions"], 1.0)
        return status | metrics

    def training_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Upstream's step with the term in its policy loss."""
        with substituted(self, actor_loss_fn=self._loss):
            return super().training_step(*args, **kwargs)

    @torch.no_grad()
    def _credit(self, items: list[Experience]) -> dict[str, float]:
        """Fit Q with these dialogues in ``memory`` and give them ``q_advantages`` and ``q_logprobs``, (N, L) each.

        Returns:
            ``q_r2`` and ``q_fit_r2``: the share of the variance of these returns to go that Q explains, before it has
            seen them (from the second rollout on) and after. Empty where nothing was decided.
        """
        if not items or "togo" not in items[0].mm_train_inputs[0]:
            return {}
        states, logprobs = self._forward(items)
        given = [item.mm_train_inputs[0] for item in items]
        allowed = torch.cat([inputs["allowed"] for inputs in given]).to(states.device)
        valid = allowed != PAD
        decision = valid.any(dim=-1)
        chosen = torch.cat([_action_tokens(item) for item in items]).to(states.device)
        togo = torch.cat([inputs["togo"] for inputs in given]).to(states.device)
        mine = [rows[decision] for rows in (states.float(), chosen, togo.float())]
        found = Decisions(*(self._gather(rows) for rows in mine))
        if not len(found.togo):
            return {}
        metrics = {"q_r2": found.explained(self._fit(states.device)) if self.memory else None}
        self.memory = (*self.memory, _to(found, "cpu"))[-MEMORY:]
        self._fitted = None
        q = self._fit(states.device)
        metrics["q_fit_r2"] = found.explained(q)
        credit = advantages(q.values(states, allowed), logprobs, valid, everywhere=self._gather)
        rows = [len(inputs["allowed"]) for inputs in given]
        parts = zip(items, credit.to(logprobs.dtype).cpu().split(rows), logprobs.cpu().split(rows), strict=True)
        for item, own, old in parts:
            item.mm_train_inputs = [{**item.mm_train_inputs[0], "q_advantages": own, "q_logprobs": old}]
        return {name: value for name, value in metrics.items() if value is not None}

    def _fit(self, device: torch.device) -> QFit:
        if self._fitted is None:
            parts = zip(*([getattr(one, f.name) for f in fields(one)] for one in self.memory), strict=True)
            self._fitted = Decisions(*(torch.cat(part).to(device) for part in parts)).fitted()
        return self._fitted

    def _forward(self, items: list[Experience]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (N, d) and label log-probabilities (N, L) of all actions, in order, at the current weights."""
        self.actor.eval()  # training_step switches back
        size, states, logprobs = self.replay_buffer.sample_batch_size, [], []
        for start in range(0, len(items), size):
            batch = make_experience_batch(items[start : start + size]).to_device(torch.cuda.current_device())
            with self.actor.choosing(batch.mm_train_inputs):
                self.actor(batch.sequences, batch.action_mask, batch.attention_mask)
                states.append(self.actor.states)
                logprobs.append(self.actor.label_logprobs)
        return torch.cat(states), torch.cat(logprobs)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all data-parallel ranks in their order, (N, ...) of any N each. Copies of a rank's model hold the
        same dialogues and are in none of its groups."""
        mesh = getattr(self.strategy, "ds_device_mesh", None)
        if mesh is None:
            return rows
        group = mesh["dp"].get_group()
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device), group=group)
        counts = [int(size) for size in sizes]
        if not any(counts):
            return rows
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def save_memory(self, path: Path) -> None:
        """Write the decisions of the last rollouts."""
        torch.save([vars(one) for one in self.memory], path)

    def load_memory(self, path: Path) -> None:
        """Read them back; a checkpoint from before the term was used has none."""
        if path.is_file():
            self.memory = tuple(Decisions(**one) for one in torch.load(path, weights_only=True, map_location="cpu"))
            self._fitted = None


class QLoss:
    """Upstream's policy loss plus ``weight`` times the term, averaged over actions as upstream averages.

    ``total`` and ``decisions``: sum of the term over the decisions seen so far, and their number.
    """

    def __init__(self, policy_loss: PolicyLoss, actor: RoleActor, weight: float) -> None:
        self.policy_loss, self.actor, self.weight = policy_loss, actor, weight
        self.token_level_loss = policy_loss.token_level_loss
        self.total = self.decisions = 0.0

    def __call__(self, *args: Any, action_mask: torch.Tensor, **options: Any) -> tuple:
        """Upstream's arguments and results, after the actor's forward pass and inside its ``choosing``."""
        loss, *rest = self.policy_loss(*args, action_mask=action_mask, **options)
        inputs = self.actor.inputs
        if "q_advantages" not in inputs:
            return loss, *rest
        valid = inputs["allowed"] != PAD
        clip = self.policy_loss.clip_eps_low, self.policy_loss.clip_eps_high
        each = surrogate(self.actor.label_logprobs, inputs["q_logprobs"], inputs["q_advantages"], valid, *clip)
        self.total += float(each.detach().sum())
        self.decisions += float(valid.any(dim=-1).sum())
        spread = each.new_zeros(action_mask.shape).index_put(action_mask.nonzero(as_tuple=True), each)
        norm = {name: options[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
        return loss + self.weight * aggregate_loss(spread, action_mask, self.token_level_loss, **norm), *rest


def _action_tokens(item: Experience) -> torch.Tensor:
    """The token of each action of one sample, (N,)."""
    places = item.action_mask.nonzero().flatten() + len(item.sequences) - len(item.action_mask)
    return item.sequences[places]


def _to(decisions: Decisions, device: str) -> Decisions:
    return Decisions(*(rows.to(device) for rows in vars(decisions).values()))
