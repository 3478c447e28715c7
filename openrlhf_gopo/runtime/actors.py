"""The Ray actors of both roles: upstream's own classes around ``RoleActor`` and our optimizer loops.

Upstream builds ``Actor`` and ``ActorPPOTrainer`` by name inside ``init_model_from_pretrained`` (OpenRLHF 0.11.2,
ppo_actor.py:510 and :585, launcher.py:107), so those names are substituted while its constructor runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch
from openrlhf.trainer.ray import launcher, ppo_actor, ppo_critic

from openrlhf_gopo.runtime.models import RoleActor, RoleCriticTrainer, RolePPOTrainer, substituted
from openrlhf_gopo.runtime.q_credit import QCreditTrainer


class _RolePolicy(ppo_actor.PolicyModelActor.__ray_metadata__.modified_class):
    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        trainer = QCreditTrainer if getattr(strategy.args, "q_weight", 0.0) else RolePPOTrainer
        with substituted(ppo_actor, Actor=RoleActor, ActorPPOTrainer=trainer):
            super().init_model_from_pretrained(strategy, *args, **kwargs)
        if trainer is QCreditTrainer and strategy.args.ckpt.load_enable and strategy.args.ckpt.tag:
            self.trainer.load_memory(self._memory_file(strategy.args.ckpt.tag))

    def save_checkpoint(self, tag: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(tag, *args, **kwargs)
        if isinstance(self.trainer, QCreditTrainer) and not self.disable_ds_ckpt and self.strategy.is_rank_0():
            self.trainer.save_memory(self._memory_file(tag))

    def _memory_file(self, tag: str) -> Path:
        """What Q was fitted to, in the folder of a checkpoint: one file, as every rank has all of it."""
        return Path(self.strategy.args.ckpt.path, "_actor", tag, "q_memory.pt")

    def forward(self, *args: Any, mm_train_inputs_list: list | None = None, **kwargs: Any) -> torch.Tensor:
        with self.actor.choosing(mm_train_inputs_list):
            return super().forward(*args, **kwargs)

    def reconnect_engines(self) -> None:
        """A new weight-sync group with the same engines, one of which was started again; upstream's, once more."""
        if not self.trainer.use_cuda_ipc and torch.distributed.get_rank() == 0:
            self.trainer._init_vllm_sync_group(getattr(self.strategy.args.vllm, "sync_backend", "nccl"))
        torch.distributed.barrier()


class _RoleReference(launcher.ReferenceModelActor.__ray_metadata__.modified_class):
    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        with substituted(launcher, Actor=RoleActor):
            super().init_model_from_pretrained(*args, **kwargs)

    def forward(self, *args: Any, mm_train_inputs_list: list | None = None, **kwargs: Any) -> torch.Tensor:
        with self.model.choosing(mm_train_inputs_list):
            return super().forward(*args, **kwargs)


class _RoleCritic(ppo_critic.CriticModelActor.__ray_metadata__.modified_class):
    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        with substituted(ppo_critic, CriticPPOTrainer=RoleCriticTrainer):
            super().init_model_from_pretrained(*args, **kwargs)


RolePolicyActor = ray.remote(num_gpus=1)(_RolePolicy)
RoleReferenceActor = ray.remote(num_gpus=1)(_RoleReference)
RoleCriticActor = ray.remote(num_gpus=1)(_RoleCritic)
