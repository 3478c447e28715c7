"""The Ray actors of both roles: upstream's own classes, with an ``Actor`` that can also be an exact categorical.

Upstream builds ``Actor`` and ``ActorPPOTrainer`` by name inside ``init_model_from_pretrained`` (OpenRLHF 0.11.2,
ppo_actor.py:510 and :585, launcher.py:107), so those names are substituted while its constructor runs. The allowed
labels of a sample travel in ``Experience.mm_train_inputs``, upstream's channel for further inputs of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import ray
import torch
from openrlhf.models import Actor
from openrlhf.models.ring_attn_utils import unpad_and_slice_tensor
from openrlhf.trainer.ray import launcher, ppo_actor
from openrlhf.utils.vlm_utils import merge_mm_train_inputs
from peft import PeftModel

from openrlhf_gopo.core.categorical import chosen_logprobs, masked_categorical_logprobs
from openrlhf_gopo.runtime.lora import MergedModel, merged_weights


class RoleActor(Actor):
    """Upstream's actor inside ``choosing(...)`` is the expert: a categorical over each decision's allowed labels."""

    _allowed: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            merged_weights(self.model)  # adapters that cannot be sent to vLLM are refused here, not after a rollout

    @contextmanager
    def choosing(self, model_inputs: list | None) -> Iterator[None]:
        """Within: ``forward`` reads ``action_mask`` as decisions, if ``model_inputs`` carries their allowed labels.

        Args:
            model_inputs: ``Experience.mm_train_inputs`` of the batch: per sample {"allowed": (T, L)} or None.
        """
        device = next(self.model.parameters()).device
        self._allowed = merge_mm_train_inputs(model_inputs or [], device).get("allowed")
        try:
            yield
        finally:
            self._allowed = None

    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        return_entropy: bool = False,
        ring_attn_group: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Log-probabilities of actions, (B, A); see upstream. For decisions the logits of no other position exist.

        Args:
            sequences: (B, S). action_mask: (B, A), A <= S - 1, True where the *next* token is an action.
        """
        if self._allowed is None:
            return super().forward(
                sequences,
                action_mask,
                attention_mask,
                return_output=return_output,
                return_entropy=return_entropy,
                ring_attn_group=ring_attn_group,
                **kwargs,
            )
        rows, columns = action_mask.nonzero(as_tuple=True)
        columns = columns + sequences.shape[1] - 1 - action_mask.shape[1]
        logits = self._decision_logits(sequences, attention_mask, rows, columns)
        logprobs, entropies = masked_categorical_logprobs(logits, self._allowed, self.temperature)
        chosen = chosen_logprobs(logprobs, self._allowed, sequences[rows, columns + 1])
        # An expert that was never asked still needs a graph, or the ranks' backward passes would not match.
        empty = logits.float().sum() * 0.0 if len(rows) == 0 else 0.0
        shape = (sequences.shape[0], sequences.shape[1] - 1)
        action_log_probs = chosen.new_zeros(shape).index_put((rows, columns), chosen) + empty
        output = SimpleNamespace(entropy=chosen.new_zeros(shape).index_put((rows, columns), entropies))
        action_log_probs = action_log_probs[:, -action_mask.shape[1] :]
        return (action_log_probs, output) if return_output else action_log_probs

    def _decision_logits(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Logits (N, V) at (rows, columns); only the union of the columns goes through the head."""
        if self.packing_samples:
            flat = rows * sequences.shape[1] + columns
            sequences, position_ids, _, _, indices = unpad_and_slice_tensor(sequences, attention_mask, None)
            rows, columns, attention_mask = torch.zeros_like(rows), torch.searchsorted(indices, flat), None
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        keep, place = columns.unique(return_inverse=True)
        if len(keep) == 0:
            keep = columns.new_zeros(1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=keep)
        return output["logits"][rows, place] if len(rows) else output["logits"].flatten(0, 1)[:0]


class RolePPOTrainer(ppo_actor.ActorPPOTrainer):
    """Upstream's PPO step; the expert's samples bring their allowed labels along."""

    def training_step(self, experience: Any, kl_ctl: float, step: int, loss_batch_info: Any = None) -> dict[str, Any]:
        """Upstream's step on one micro-batch, which may hold no action at all: a quarantined dialogue has none."""
        if self.args.train.dynamic_batch_enable and self.args.ds.zero_stage in (1, 2):
            # Upstream tells DeepSpeed of one backward pass a step, so ZeRO-1/2 would keep the last micro-batch alone.
            last = bool(self.replay_buffer.dynamic_optimizer_step[step])
            self.actor.model.set_gradient_accumulation_boundary(last)
        with self.actor.choosing(experience.mm_train_inputs):
            status = super().training_step(experience, kl_ctl, step, loss_batch_info)
        if status["num_action_tokens"] == 0:  # upstream divides by it, and its means over no action are nan
            status["num_action_tokens"] = 1e-9
            status["metrics"] = {
                name: value.nan_to_num(0.0) if isinstance(value, torch.Tensor) else value
                for name, value in status["metrics"].items()
            }
        return status

    def broadcast_to_vllm(self) -> None:
        """Upstream's loop; of a model with LoRA it sees the merged weights under the base model's names."""
        if not isinstance(self.actor.model.module, PeftModel):
            return super().broadcast_to_vllm()
        merged = MergedModel(self.actor.model.module)
        actor = SimpleNamespace(model=SimpleNamespace(module=merged))
        zero = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=merged.gathered))
        with substituted(self, actor=actor), substituted(ppo_actor, deepspeed=zero):
            super().broadcast_to_vllm()


class _RolePolicy(ppo_actor.PolicyModelActor.__ray_metadata__.modified_class):
    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        trainer, preference = RolePPOTrainer, getattr(strategy.args, "preference", None)
        if preference is not None and preference.trust_region == "exact":
            from openrlhf_gopo.runtime.exact import ExactPreferenceTrainer as trainer  # it builds on this module
        with substituted(ppo_actor, Actor=RoleActor, ActorPPOTrainer=trainer):
            super().init_model_from_pretrained(strategy, *args, **kwargs)

    def forward(self, *args: Any, mm_train_inputs_list: list | None = None, **kwargs: Any) -> torch.Tensor:
        with self.actor.choosing(mm_train_inputs_list):
            return super().forward(*args, **kwargs)


class _RoleReference(launcher.ReferenceModelActor.__ray_metadata__.modified_class):
    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        with substituted(launcher, Actor=RoleActor):
            super().init_model_from_pretrained(*args, **kwargs)

    def forward(self, *args: Any, mm_train_inputs_list: list | None = None, **kwargs: Any) -> torch.Tensor:
        with self.model.choosing(mm_train_inputs_list):
            return super().forward(*args, **kwargs)


@contextmanager
def substituted(owner: ModuleType | RolePPOTrainer, **names: Any) -> Iterator[None]:
    """Replace attributes of ``owner`` for the duration of the block. Each model lives in a process of its own."""
    originals = {name: getattr(owner, name) for name in names}
    vars(owner).update(names)
    try:
        yield
    finally:
        vars(owner).update(originals)


RolePolicyActor = ray.remote(num_gpus=1)(_RolePolicy)
RoleReferenceActor = ray.remote(num_gpus=1)(_RoleReference)
