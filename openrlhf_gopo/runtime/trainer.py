"""The controller: one rollout, two policies learning from it, one clock."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from openrlhf.trainer.ppo_trainer import BasePPOTrainer
from openrlhf.trainer.ppo_utils.experience import balance_experiences
from openrlhf.utils.logging_utils import init_logger
from tqdm import tqdm

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.envs import Environment
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.evaluation.references import add_reference_scores
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.evaluation.transcript import as_text
from openrlhf_gopo.runtime.experience_maker import ExpertExperienceMaker, GOPOExperienceMaker, ResponderExperienceMaker
from openrlhf_gopo.runtime.roles import Role
from openrlhf_gopo.runtime.samples import DialogueSample
from openrlhf_gopo.runtime.samples_generator import GoalDataset, GOPOSamplesGenerator, RolloutSpec
from openrlhf_gopo.types import Trajectory

logger = init_logger(__name__)

EXAMPLES = 8  # dialogues of an evaluation that are also written as text


class Learner(BasePPOTrainer):
    """One role's half of a step: experiences, update, weight sync. Everything but the maker is upstream's."""

    def __init__(self, role: Role, config: GopoConfig, num_labels: int, tokenizer: Any) -> None:
        super().__init__(role.strategy, role.actor, role.critic, None, role.reference, role.engines, tokenizer)
        self.role = role.name
        decides = role.name == EXPERT or config.policy == "single_level"
        groups = (role.actor, role.critic, None, role.reference, self.kl_ctl, role.strategy, tokenizer)
        maker = ExpertExperienceMaker if role.name == EXPERT else ResponderExperienceMaker
        self.experience_maker: GOPOExperienceMaker = maker(
            *groups, role=role.name, num_labels=num_labels if decides else 0, config=config
        )

    def learn(self, samples: list[DialogueSample], global_step: int) -> dict[str, Any]:
        """One update on ``samples``; returns the metrics of the role, prefixed with its name."""
        start = time.time()
        experiences = self.experience_maker.make_experience_batch(samples)
        if self.args.train.dynamic_batch_enable:
            experiences = balance_experiences(experiences, self.args)
        made = time.time()
        refs = self.actor_model_group.async_run_method_batch(method_name="append", experience=experiences)
        if self.critic_model_group is not None:
            refs += self.critic_model_group.async_run_method_batch(method_name="append", experience=experiences)
        ray.get(refs)
        status = {**self.ppo_train(global_step), **self.experience_maker.metrics}
        status["time_experience"], status["time_update"] = made - start, time.time() - made
        return {f"{self.role}/{key}": value for key, value in status.items()}


class GOPOTrainer(BasePPOTrainer):
    """Trains the roles of a policy from dialogues about goals; upstream's ``actor`` is the responder.

    Args:
        strategy: of the run as a whole: upstream's flags as given, loggers included.
        roles: {"expert", "responder"}, with sharing of the same actor group and engines; {"responder"} if single-level.
        env: the environment; its train goals are the data, its held-out goals the evaluation.
        spec: what a rollout needs beyond a goal.
        results: folder for metrics.jsonl, trajectories.jsonl and the evaluations.
    """

    def __init__(
        self,
        strategy: Any,
        roles: dict[str, Role],
        env: Environment,
        config: GopoConfig,
        spec: RolloutSpec,
        tokenizers: dict[str, Any],
        num_labels: int,
        results: Path,
    ) -> None:
        responder = roles[RESPONDER]
        groups = (responder.actor, responder.critic, None, responder.reference, responder.engines)
        super().__init__(strategy, *groups, tokenizers[RESPONDER])
        self.env, self.config, self.results = env, config, results
        self.learners = {name: Learner(role, config, num_labels, tokenizers[name]) for name, role in roles.items()}
        self.num_labels = num_labels
        for interval in (self.args.eval, self.args.ckpt):
            key = "steps" if interval is self.args.eval else "save_steps"
            if getattr(interval, key) == -1:
                setattr(interval, key, float("inf"))
        self.best_eval_metric_key = self.best_eval_metric_key or "eval_tse"
        train = GoalDataset(list(env.goals("train"))[: self.args.data.max_samples])
        heldout = GoalDataset(list(env.goals("heldout"))[: config.eval_goals])
        loader = self.strategy.setup_dataloader
        self.goals_dataloader = loader(train, 1, shuffle=True, collate_fn=GoalDataset.collate_fn)
        self.samples_generator = GOPOSamplesGenerator(
            strategy=self.strategy,
            prompts_dataloader=self.goals_dataloader,
            eval_dataloader=loader(heldout, 1, shuffle=False, collate_fn=GoalDataset.collate_fn),
            tokenizer=self.tokenizer,
            vllm_engines=responder.engines,
            expert_engines=roles[EXPERT].engines if config.own_expert else None,
            spec=spec,
            folder=results,
        )
        batches = len(train) // self.args.rollout.batch_size
        self.steps_per_episode = batches
        updates = batches * self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt
        steps = updates // self.args.train.batch_size * self.args.train.num_episodes * self.args.train.max_epochs
        # One scheduler step per optimizer step of a model; a shared model takes those of both roles.
        if config.schedule == "alternate" and config.own_expert:
            self.max_steps = -(-steps // 2)
        else:
            self.max_steps = steps * (2 if config.sharing == "shared" and config.schedule == "joint" else 1)

    def fit(self, global_step: int = 0) -> dict[str, list[Trajectory]]:
        """Train for ``--train.num_episodes`` passes over the goals.

        Returns:
            The held-out dialogues "before training" and "after training"; empty without --eval.steps.
        """
        states = self._resume()
        global_step = states["global_step"] or global_step
        consumed = states["total_consumed_prompts"]
        phases: dict[str, list[Trajectory]] = {}
        evaluates = self.args.eval.steps != float("inf")
        if evaluates and not global_step:
            phases["before training"] = self.evaluate(0)[1]
        total = self.steps_per_episode * self.args.train.num_episodes
        bar = tqdm(total=total, initial=global_step, desc="GOPO", unit="step", dynamic_ncols=True)
        latest: tuple[int, list[Trajectory]] = (0, [])
        for episode in range(states["episode"], self.args.train.num_episodes):
            exhausted = False
            while not exhausted:
                start = time.time()
                samples, pass_rate, used, exhausted = self.samples_generator.generate_samples(
                    temperature=self.args.rollout.temperature
                )
                consumed += used
                if len(samples) < self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt:
                    continue  # the remainder of a pass: too few goals for a batch, as drop_last in upstream's loader
                rollout_time = time.time() - start
                status, global_step = self.train_step(samples, global_step)
                status["timing/rollout"] = rollout_time
                if pass_rate is not None:
                    status["dynamic_filtering_pass_rate"] = pass_rate
                client_states = {
                    "episode": episode,
                    "global_step": global_step,
                    "total_consumed_prompts": consumed,
                    "data_loader_state_dict": self.goals_dataloader.state_dict(),
                }
                self.log_metrics(global_step, status)
                status |= self._example(samples)
                self.save_logs_and_checkpoints(global_step, status, client_states)
                if global_step % self.args.eval.steps == 0:
                    logs, played = self.evaluate(global_step)
                    latest = (global_step, played)
                    self.save_best_checkpoint(logs, global_step, client_states)
                bar.set_postfix(tse=f"{status['rollout/tse']:.1f}", success=f"{status['rollout/success']:.2f}")
                bar.update()
        bar.close()
        if evaluates:
            phases["after training"] = (
                latest[1] if latest[0] == global_step and global_step else self.evaluate(global_step)[1]
            )
        for tracker in (self.wandb_logger, self.tensorboard_logger):
            if tracker:
                tracker.close()
        return phases

    def train_step(self, samples: list[DialogueSample], global_step: int) -> tuple[dict[str, Any], int]:
        """The roles whose turn it is learn from ``samples``, then their engines get the new weights."""
        status = self._rollout_metrics(samples)
        start = time.time()
        roles = self.config.learners(global_step)
        # On devices of their own the roles learn at the same time; on the same devices, one after the other.
        together = len(roles) if self.config.own_expert and not self.args.train.colocate_all else 1
        with ThreadPoolExecutor(together) as pool:
            for learned in pool.map(lambda role: self.learners[role].learn(samples, global_step), roles):
                status.update(learned)
        status["timing/learn"] = time.time() - start
        start = time.time()
        self.broadcast_to_vllm(roles)
        status["timing/sync"] = time.time() - start
        return status, global_step + 1

    def broadcast_to_vllm(self, roles: tuple[str, ...] | None = None) -> None:
        """Send the weights of ``roles`` (None: all) to their engines; with sharing there is one set of both."""
        for name in (roles or self.config.roles) if self.config.own_expert else (RESPONDER,):
            self.learners[name].broadcast_to_vllm()

    def evaluate(self, global_step: int) -> tuple[dict[str, float], list[Trajectory]]:
        """Play the held-out goals with the current weights; logs ``eval_*`` and returns the dialogues."""
        folder = self.results / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        played = self.samples_generator.evaluate(
            folder / f"step_{global_step:05d}.jsonl",
            temperature=self.args.eval.temperature,
            n_samples_per_prompt=self.args.eval.n_samples_per_prompt,
        )
        add_reference_scores(self.env, played)
        (folder / f"step_{global_step:05d}.txt").write_text("\n\n".join(map(as_text, played[:EXAMPLES])) + "\n")
        summary = summarise(played)
        logs = {f"eval_{key}": interval.mean for key, interval in summary.metrics.items()}
        tse = summary.metrics.get("tse")
        if tse is not None:
            logs |= {"eval_tse_low": tse.low, "eval_tse_high": tse.high}
        logs["eval_failures"] = float(summary.failures)
        self.log_metrics(global_step, logs)
        for tracker in (self.wandb_logger, self.tensorboard_logger):
            if tracker:
                tracker.log_eval(global_step, logs)
        return logs, played

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        """Upstream's, for the responder; the expert's checkpoint is written first, under the same tag."""
        if global_step % self.args.ckpt.save_steps == 0 and self.config.own_expert:
            self._save_expert(f"global_step{global_step}", client_states, self._latest_eval_metric_value)
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)

    def save_best_checkpoint(self, eval_metrics: dict, global_step: int, client_states: Any = None) -> None:
        """Upstream's, for both roles: the expert's copy first, whenever the responder's will be written."""
        value = eval_metrics.get(self.best_eval_metric_key)
        if value is not None and value > self.best_eval_metric_value and self.config.own_expert:
            self._save_expert(f"best_global_step{global_step}", client_states, value)
        super().save_best_checkpoint(eval_metrics, global_step, client_states)

    def _save_expert(self, tag: str, client_states: Any, value: float | None) -> None:
        expert = self.learners[EXPERT]
        refs = expert.actor_model_group.async_run_method(
            method_name="save_checkpoint",
            tag=tag,
            client_states=dict(client_states or {}),
            metric_value=value,
            metric_key=self.best_eval_metric_key,
        )
        if expert.critic_model_group is not None:
            refs += expert.critic_model_group.async_run_method(
                method_name="save_checkpoint", tag=tag, metric_value=value, metric_key=self.best_eval_metric_key
            )
        ray.get(refs)

    def _resume(self) -> dict[str, Any]:
        """Where to go on: the checkpoint of both roles, or the start.

        Raises:
            ConfigError: the two roles' checkpoints are of different steps.
        """
        states = {name: learner.init_checkpoint_states() for name, learner in self.learners.items()}
        steps = {name: state.get("global_step", 0) for name, state in states.items()}
        if len(set(steps.values())) > 1:
            raise ConfigError(
                f"--ckpt.path {self.args.ckpt.path}: the roles' checkpoints are of different steps {steps}; remove the "
                "newer role's folder of that step and its 'latest' file's entry"
            )
        state = states[RESPONDER]
        if state.get("global_step", 0):
            self.restore_best_checkpoint_state(state)
            self.broadcast_to_vllm()
            if state["data_loader_state_dict"]:
                self.goals_dataloader.load_state_dict(state["data_loader_state_dict"])
        return state

    def _rollout_metrics(self, samples: list[DialogueSample]) -> dict[str, Any]:
        kept = [s for s in samples if not s.quarantined]
        summary = summarise([s.trajectory for s in samples])
        status: dict[str, Any] = {f"rollout/{key}": interval.mean for key, interval in summary.metrics.items()}
        status |= {f"rollout/stop/{key}": share for key, share in summary.stops.items()}
        status["rollout/failures"] = float(len(samples) - len(kept))
        turns = [turn for s in kept for turn in s.trajectory.turns]
        status["rollout/forced_turns"] = sum(turn.forced for turn in turns) / max(len(turns), 1)
        allowed = sum(len(turn.allowed) for turn in turns) / max(len(turns), 1)
        status["rollout/masked_labels"] = 1.0 - allowed / self.num_labels
        for role in self.learners:
            lengths = [len(s.trajectory.streams[role].tokens) for s in kept]
            status[f"rollout/{role}_tokens"] = sum(lengths) / max(len(lengths), 1)
        return status

    def _example(self, samples: list[DialogueSample]) -> dict[str, Any]:
        """One dialogue for W&B and TensorBoard, under upstream's name: (text, the responder's return)."""
        kept = [s for s in samples if not s.quarantined]
        return {"generated_samples": (as_text(kept[0].trajectory), kept[0].returns[RESPONDER])} if kept else {}

    def log_metrics(self, global_step: int, status: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        record = {"global_step": global_step, "time": time.time(), **status}
        with (self.results / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.debug("step %d: %s", global_step, status)
