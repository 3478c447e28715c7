"""One role as upstream sees it: its own arguments, strategy, actor groups and engines."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from openrlhf.utils import get_strategy

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig


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
        own.preference = config.pref
        own.critic.model_name_or_path = args.expert.model_name_or_path if config.expert_has_critic else None
        if own.actor.entropy_coef is None:  # upstream: 0 means log it; a categorical's entropy costs nothing
            own.actor.entropy_coef = 0.0
        own.vllm.num_engines = config.expert_num_engines or args.vllm.num_engines
        own.vllm.gpu_memory_utilization = config.expert_gpu_memory_utilization or args.vllm.gpu_memory_utilization
    own.ckpt.path = os.path.join(args.ckpt.path, role)
    own.ckpt.output_dir = os.path.join(args.ckpt.output_dir, role)
    own.logger.wandb.key = own.logger.tensorboard_dir = None
    return own


def make_roles(args: SimpleNamespace, config: GopoConfig) -> dict[str, Role]:
    """The policy's roles, without models yet. With ``shared`` the expert is the responder's model in another role."""
    roles = {}
    for name in config.roles:
        source = name if config.own_expert else RESPONDER
        roles[name] = Role(name, get_strategy(role_args(args, source, config)))
    return roles
