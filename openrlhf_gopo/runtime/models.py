"""Upstream's ``Actor`` and optimizer loop, scoring actions only and decisions exactly.

The allowed labels of a sample travel in ``Experience.mm_train_inputs``, upstream's channel for further model inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.models import Actor
from openrlhf.models.ring_attn_utils import unpad_and_slice_tensor
from openrlhf.models.utils import compute_entropy, log_probs_from_logits
from openrlhf.trainer.ray import ppo_actor, ppo_critic
from openrlhf.utils.loss_utils import get_loss_batch_info
from openrlhf.utils.vlm_utils import merge_mm_train_inputs
from peft import PeftModel

from openrlhf_gopo.core.categorical import PAD, chosen_logprobs, masked_categorical_logprobs
from openrlhf_gopo.runtime.lora import MergedModel, merged_weights


class RoleActor(Actor):
    """Upstream's actor that computes the logits of actions only, and inside ``choosing(...)`` knows which of them were
    decisions: those follow a categorical over the labels that the SOP allowed.

    Attributes:
        inputs: inside ``choosing``, the batch's ``mm_train_inputs`` merged: name -> one row per action.
        states: after a forward pass inside ``choosing``, the hidden states (N, d) of its actions at the head.
        label_logprobs: beside them log pi of every allowed label (N, L), with a graph; -inf at padding and words.
    """

    states: torch.Tensor | None = None
    label_logprobs: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inputs: dict[str, torch.Tensor] = {}
        if isinstance(self.model, PeftModel):
            merged_weights(self.model)  # adapters that cannot be sent to vLLM are refused here, not after a rollout

    @contextmanager
    def choosing(self, model_inputs: list | None) -> Iterator[None]:
        """Within: ``forward`` reads actions as decisions where ``model_inputs`` carries their allowed labels.

        Args:
            model_inputs: ``Experience.mm_train_inputs`` of the batch: per sample {"allowed": (N, L)} or None; one row
                per action of the batch, in order, without any label where the whole vocabulary was open.
        """
        device = next(self.model.parameters()).device
        self.inputs = merge_mm_train_inputs(model_inputs or [], device)
        try:
            yield
        finally:  # no graph outlives the step
            self.inputs, self.states, self.label_logprobs = {}, None, None

    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        return_entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Log-probabilities of actions, (B, A), zero elsewhere; see upstream. No other position's logits exist.

        Args:
            sequences: (B, S). action_mask: (B, A), A <= S - 1, True where the *next* token is an action.

        Returns:
            With ``return_output`` also the model's output: ``logits`` (1, N, V) of the N actions and, with
            ``return_entropy``, ``entropy`` (B, S - 1) in nats, of the categorical where it was a decision.
        """
        if action_mask is None or kwargs.get("ring_attn_group") is not None:
            options = {"return_output": return_output, "return_entropy": return_entropy, **kwargs}
            return super().forward(sequences, action_mask, attention_mask, **options)
        rows, columns = action_mask.nonzero(as_tuple=True)
        columns = columns + sequences.shape[1] - 1 - action_mask.shape[1]
        output = self._forward_actions(sequences, attention_mask, rows, columns)
        logits = output["logits"][0]
        logprobs, entropy = self._score(logits, sequences[rows, columns + 1], return_entropy)
        # Where a batch has no action this keeps a graph, or the ranks' backward passes would not match.
        shape = (sequences.shape[0], sequences.shape[1] - 1)
        action_log_probs = logprobs.new_zeros(shape).index_put((rows, columns), logprobs)[:, -action_mask.shape[1] :]
        if return_entropy:
            output.entropy = entropy.new_zeros(shape).index_put((rows, columns), entropy)
        return (action_log_probs, output) if return_output else action_log_probs

    def _score(
        self, logits: torch.Tensor, tokens: torch.Tensor, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi of each action and its entropy (zeros unless asked for): logits (N, V), tokens (N,) -> (N,), (N,)."""
        allowed = self.inputs.get("allowed")
        if allowed is None or allowed.shape[1] == 0:
            return self._score_words(logits, tokens, with_entropy)
        decision = (allowed != PAD).any(dim=-1)
        if bool(decision.all()):
            return self._score_labels(logits, tokens, allowed)
        words = ~decision
        of_words = self._score_words(logits[words], tokens[words], with_entropy)
        of_labels = self._score_labels(logits[decision], tokens[decision], allowed[decision])
        nothing = self.label_logprobs.new_full(allowed.shape, float("-inf"))
        self.label_logprobs = nothing.index_put((decision,), self.label_logprobs)
        both = (word.new_zeros(len(tokens)) for word in of_words)
        logprobs, entropy = (
            out.index_put((words,), word).index_put((decision,), label)
            for out, word, label in zip(both, of_words, of_labels, strict=True)
        )
        return logprobs, entropy

    def _score_words(
        self, logits: torch.Tensor, tokens: torch.Tensor, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(tokens) == 0:  # upstream's kernels take no empty batch; this one keeps the graph
            return logits.float().sum(dim=-1), logits.new_zeros(0)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scaled = logits if self.temperature == 1.0 else logits / self.temperature
        logprobs = log_probs_from_logits(scaled, tokens)
        return logprobs, compute_entropy(scaled) if with_entropy else torch.zeros_like(logprobs)

    def _score_labels(
        self, logits: torch.Tensor, tokens: torch.Tensor, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = masked_categorical_logprobs(logits, allowed, self.temperature)
        self.label_logprobs = logprobs
        return chosen_logprobs(logprobs, allowed, tokens), entropy

    def _forward_actions(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> Any:
        """The model's output with logits (1, N, V) at (rows, columns): only these hidden states reach the head."""
        if self.packing_samples:
            flat = rows * sequences.shape[1] + columns
            sequences, position_ids, _, _, indices = unpad_and_slice_tensor(sequences, attention_mask, None)
            rows, columns, attention_mask = torch.zeros_like(rows), torch.searchsorted(indices, flat), None
        elif getattr(self, "is_vlm", False):
            position_ids = None  # as upstream: a vision-language model has positions of its own, for text too
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)

        # Through the head's own forward, so that ZeRO-3 gathers its weight; transformers' logits_to_keep knows columns
        # only, and the replies of a batch stand in different ones.
        def select(_head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            states = args[0][rows, columns]
            self.states = states.detach() if self.inputs else None
            return (states.unsqueeze(0), *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            return self.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
        finally:
            handle.remove()


class RolePPOTrainer(ppo_actor.ActorPPOTrainer):
    """Upstream's PPO step; the expert's samples bring their allowed labels along."""

    def training_step(self, experience: Any, kl_ctl: float, step: int, loss_batch_info: Any = None) -> dict[str, Any]:
        """Upstream's step on one micro-batch, which may hold no action at all: a quarantined dialogue has none."""
        if self.args.train.dynamic_batch_enable and self.args.ds.zero_stage in (1, 2):
            # Upstream tells DeepSpeed of one backward pass a step, so ZeRO-1/2 would keep the last micro-batch alone.
            last = bool(self.replay_buffer.dynamic_optimizer_step[step])
            self.actor.model.set_gradient_accumulation_boundary(last)
        loss_batch_info = loss_batch_info or get_loss_batch_info(
            self.strategy,
            experience.action_mask,
            replay_buffer=self.replay_buffer,
            step=step,
            dynamic_batch=self.args.train.dynamic_batch_enable,
        )
        with self.actor.choosing(experience.mm_train_inputs):
            status = super().training_step(experience, kl_ctl, step, loss_batch_info)
        self._local_means(status, loss_batch_info)
        if status["num_action_tokens"] == 0:  # upstream divides by it, and its means over no action are nan
            status["num_action_tokens"] = 1e-9
            status["metrics"] = {
                name: value.nan_to_num(0.0) if isinstance(value, torch.Tensor) else value
                for name, value in status["metrics"].items()
            }
        return status

    def _local_means(self, status: dict[str, Any], info: dict[str, Any]) -> None:
        """Losses as means over the micro-batch's actions: upstream has shares of the optimizer step's mean here, and
        then weighs them by actions as if they were means."""
        names = ["entropy_loss", *(["kl"] if self.args.algo.kl.use_loss else [])]
        names += ["policy_loss"] if self.actor_loss_fn.token_level_loss else []
        factor = float(info["batch_num_tokens"]) / info["dp_size"] / max(status["num_action_tokens"], 1.0)
        metrics = status["metrics"]
        metrics |= {name: metrics[name] * factor for name in names if name in metrics}

    def broadcast_to_vllm(self) -> None:
        """Upstream's loop; of a model with LoRA it sees the merged weights under the base model's names."""
        if not isinstance(self.actor.model.module, PeftModel):
            return super().broadcast_to_vllm()
        merged = MergedModel(self.actor.model.module)
        actor = SimpleNamespace(model=SimpleNamespace(module=merged))
        zero = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=merged.gathered))
        with substituted(self, actor=actor), substituted(ppo_actor, deepspeed=zero):
            super().broadcast_to_vllm()


class RoleCriticTrainer(ppo_critic.CriticPPOTrainer):
    """Upstream's critic, which divides by the number of actions: there may be none, of a micro-batch or of a step."""

    def training_step(self, experience: Any, step: int, loss_batch_info: Any = None) -> dict[str, float]:
        if loss_batch_info is not None:
            actions = loss_batch_info["batch_num_tokens"].clamp(min=1e-6)
            loss_batch_info = loss_batch_info | {"batch_num_tokens": actions}
        status = super().training_step(experience, step, loss_batch_info)
        return {name: 0.0 if math.isnan(value) else value for name, value in status.items()}


@contextmanager
def substituted(owner: object, **names: Any) -> Iterator[None]:
    """Replace attributes of ``owner`` for the duration of the block. Each model lives in a process of its own."""
    originals = {name: getattr(owner, name) for name in names}
    vars(owner).update(names)
    try:
        yield
    finally:
        vars(owner).update(originals)
