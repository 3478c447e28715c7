"""One role's half of a training step."""

from __future__ import annotations

import time
from typing import Any

import ray
from openrlhf.trainer.ppo_trainer import BasePPOTrainer
from openrlhf.trainer.ppo_utils.experience import Experience, balance_experiences

from openrlhf_gopo.config import EXPERT, GopoConfig
from openrlhf_gopo.runtime.experience_maker import GOPOExperienceMaker, ResponderExperienceMaker
from openrlhf_gopo.runtime.expert_experience import ExpertExperienceMaker
from openrlhf_gopo.runtime.reply_groups import ReplyGroupExperienceMaker
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.roles import Role
from openrlhf_gopo.runtime.samples import DialogueSample


class Learner(BasePPOTrainer):
    """One role's half of a step: experiences, update, weight sync. Everything but the maker is upstream's."""

    def __init__(self, role: Role, config: GopoConfig, num_labels: int, tokenizer: Any, restarts: Restarts) -> None:
        super().__init__(role.strategy, role.actor, role.critic, None, role.reference, role.engines, tokenizer)
        self.role, self.of, self.restarts = role.name, role, restarts
        decides = role.name == EXPERT or config.policy == "single_level"
        groups = (role.actor, role.critic, None, role.reference, self.kl_ctl, role.strategy, tokenizer)
        of_replies = ReplyGroupExperienceMaker if config.reply_group > 1 else ResponderExperienceMaker
        maker = ExpertExperienceMaker if role.name == EXPERT else of_replies
        self.experience_maker: GOPOExperienceMaker = maker(
            *groups, role=role.name, num_labels=num_labels if decides else 0, config=config
        )

    def experiences(self, samples: list[DialogueSample]) -> list[Experience]:
        """What the role learns from: log-probabilities of the weights as they are, advantages."""
        start = time.time()
        made = self.experience_maker.make_experience_batch(samples)
        if self.args.train.dynamic_batch_enable:
            made = balance_experiences(made, self.args)
        self.experience_maker.metrics["time_experience"] = time.time() - start
        return made

    def update(self, experiences: list[Experience], global_step: int) -> dict[str, Any]:
        """One update; returns the metrics of the role, prefixed with its name."""
        start, groups = time.time(), [self.critic_model_group]
        if global_step > self.args.critic.freezing_steps:  # a frozen actor would pile them up
            groups.append(self.actor_model_group)
        appended = [g.async_run_method_batch(method_name="append", experience=experiences) for g in groups if g]
        ray.get([ref for refs in appended for ref in refs])
        status = {**self.ppo_train(global_step), **self.experience_maker.metrics}
        status["time_update"] = time.time() - start
        return {f"{self.role}/{key}": value for key, value in status.items()}

    def broadcast_to_vllm(self) -> None:
        """Upstream's, to engines that were started again too."""
        with self.restarts.rejoined(self.of):
            super().broadcast_to_vllm()
