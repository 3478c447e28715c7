"""One role as upstream sees it: its own arguments, strategy, actor groups and engines."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.utils import get_strategy
from openrlhf.utils.deepspeed import DeepspeedStrategy

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.errors import CheckpointError
from openrlhf_gopo.runtime.checkpoints.random_states import random_states, restore_random_states
from openrlhf_gopo.runtime.checks import batches_of


class RoleStrategy(DeepspeedStrategy):
    """Upstream's, but a checkpoint is one folder of a set that the driver keeps (see ``manifest``).

    Upstream's own ``save_ckpt`` lets old folders go role by role, which tears sets apart, and ``load_ckpt`` follows a
    ``latest`` file per role and goes on with fresh weights where it finds none.
    """

    def save_ckpt(self, model: Any, save_dir: str, tag: str, *_limits: Any, client_state: Any = None, **_: Any) -> None:
        """Weights, optimizer, scheduler and this rank's random states, into ``save_dir/tag``; no ``latest`` file."""
        model.save_checkpoint(save_dir, tag=tag, client_state=client_state or {}, save_latest=False)
        torch.save(random_states(), Path(save_dir, tag, f"random_rank{self.get_rank()}.pt"))
        if dist.is_initialized():
            dist.barrier()

    def load_ckpt(self, model: Any, load_dir: str, tag: str | None = None, **options: Any) -> tuple[str, dict]:
        """The set that the driver chose (``args.ckpt.tag``).

        Raises:
            CheckpointError: DeepSpeed found nothing to load.
        """
        tag = tag or self.args.ckpt.tag
        path, states = super().load_ckpt(model, load_dir, tag, **options)
        if path is None:
            raise CheckpointError(
                f"{load_dir}/{tag}: DeepSpeed finds no checkpoint there; leave out --ckpt.load_enable"
            )
        random = Path(load_dir, tag, f"random_rank{self.get_rank()}.pt")
        if random.is_file():  # of a world of another size (universal checkpoints) there is none
            restore_random_states(torch.load(random, weights_only=True))
        return path, states


@dataclass
class Role:
    """One policy under training. Groups are upstream's ``RayActorGroup``; ``engines`` are its vLLM rollout actors."""

    name: str
    strategy: Any
    actor: Any = None
    reference: Any = None
    critic: Any = None
    engines: list | None = None

    @property
    def args(self) -> SimpleNamespace:
        """Upstream's nested arguments as this role's classes read them."""
        return self.strategy.args


def role_args(args: SimpleNamespace, role: str, config: GopoConfig) -> SimpleNamespace:
    """Upstream's arguments with ``args.actor`` being ``role``, and folders of its own.

    The expert's critic, if it has one, starts from the expert's model, and its engines are its own. Loggers belong to
    the trainer, not to a role.
    """
    own = deepcopy(args)
    if role == EXPERT:
        own.actor = deepcopy(args.expert)
        own.critic.model_name_or_path = args.expert.model_name_or_path if config.expert_has_critic else None
        if own.actor.entropy_coef is None:  # upstream: 0 means log it; a categorical's entropy costs nothing
            own.actor.entropy_coef = 0.0
        own.vllm.num_engines = config.expert_num_engines or args.vllm.num_engines
        own.vllm.gpu_memory_utilization = config.expert_gpu_memory_utilization or args.vllm.gpu_memory_utilization
        own.train.batch_size, own.train.max_epochs = batches_of(args, role, config)
    # One model in both roles is the responder's, and learns as the expert too.
    own.q_weight = config.expert_terms.get("q", 0.0) if role == EXPERT or config.sharing == "shared" else 0.0
    own.ckpt.path = os.path.join(args.ckpt.path, role)
    own.ckpt.output_dir = os.path.join(args.ckpt.output_dir, role)
    own.ckpt.tag = None
    own.logger.wandb.key = own.logger.tensorboard_dir = None
    return own


def role_strategy(args: SimpleNamespace) -> RoleStrategy:
    """Upstream's strategy of a role's arguments, with checkpoints that belong to sets."""
    strategy = get_strategy(args)
    strategy.__class__ = RoleStrategy  # upstream's factory names its class inside; methods alone differ
    return strategy


def make_roles(args: SimpleNamespace, config: GopoConfig) -> dict[str, Role]:
    """The policy's roles, without models yet. With ``shared`` the expert is the responder's model in another role."""
    roles = {}
    for name in config.roles:
        own = role_args(args, name if config.own_expert else RESPONDER, config)
        if not (config.expert_has_critic if name == EXPERT else args.critic.model_name_or_path):
            own.critic.freezing_steps = -1  # of a critic that this role does not have
        roles[name] = Role(name, role_strategy(own))
    return roles
