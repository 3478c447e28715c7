"""The controller: one rollout, two policies learning from it, one clock."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from openrlhf.trainer.ppo_trainer import BasePPOTrainer
from openrlhf.utils.logging_utils import init_logger
from tqdm import tqdm

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.envs import Environment
from openrlhf_gopo.evaluation.decoding import Rows
from openrlhf_gopo.evaluation.records import append_line
from openrlhf_gopo.evaluation.transcript import as_text
from openrlhf_gopo.runtime.checkpoints.checkpoint import Checkpoints
from openrlhf_gopo.runtime.heldout import HeldOut, Played
from openrlhf_gopo.runtime.learner import Learner
from openrlhf_gopo.runtime.requests import Switch
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.roles import Role
from openrlhf_gopo.runtime.rollout_metrics import rollout_metrics
from openrlhf_gopo.runtime.rollouts import Batch, Rollouts, RolloutsAhead
from openrlhf_gopo.runtime.samples import DialogueSample
from openrlhf_gopo.runtime.samples_generator import GoalDataset, GOPOSamplesGenerator, RolloutSpec

logger = init_logger(__name__)


class GOPOTrainer(BasePPOTrainer):
    """Trains the roles of a policy from dialogues about goals; upstream's ``actor`` is the responder.

    Args:
        strategy: of the run as a whole: upstream's flags as given, loggers included.
        roles: {"expert", "responder"}, with sharing of the same actor group and engines; {"responder"} if single-level.
        env: the environment; its train goals are the data, its held-out goals the evaluation.
        spec: what a rollout needs beyond a goal.
        results: folder for metrics.jsonl, trajectories.jsonl and the evaluations.
        checkpoints: where the run is saved, and what it goes on from.
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
        checkpoints: Checkpoints,
    ) -> None:
        responder = roles[RESPONDER]
        groups = (responder.actor, responder.critic, None, responder.reference, responder.engines)
        super().__init__(strategy, *groups, tokenizers[RESPONDER])
        self.env, self.config, self.results, self.checkpoints = env, config, results, checkpoints
        self.restarts = Restarts(roles)
        self.learners = {
            name: Learner(role, config, num_labels, tokenizers[name], self.restarts) for name, role in roles.items()
        }
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
            restarts=self.restarts,
            spec=spec,
            folder=results,
        )
        self.heldout = HeldOut(env, self.samples_generator, self.args, results / "eval")
        self.steps_per_episode = len(train) // self.args.rollout.batch_size

    def scheduled_steps(self, role: str) -> int:
        """Optimizer steps that ``role`` takes in the whole run: what its learning-rate schedule spans."""
        own = self.learners[role].args
        dialogues = own.rollout.batch_size * own.rollout.n_samples_per_prompt
        of_each = dialogues // own.train.batch_size * own.train.max_epochs
        steps = range(self.steps_per_episode * self.args.train.num_episodes)
        return of_each * sum(role in self.config.learners(step) for step in steps)

    @property
    def planned_steps(self) -> int:
        """Updates of the whole run; dynamic filtering, which uses goals up, may leave fewer."""
        return self.steps_per_episode * self.args.train.num_episodes

    def fit(self, global_step: int = 0) -> Rows:
        """Train for ``--train.num_episodes`` passes over the goals.

        Returns:
            The held-out dialogues "before training" and "after training", sampled and greedy; empty without
            --eval.steps. A run that goes on reads back what was played before it.
        """
        position = self.checkpoints.restore(self)
        global_step = position["global_step"] or global_step
        self.samples_generator.version = global_step
        ahead = RolloutsAhead if self.args.train.async_enable else Rollouts
        self.rollouts = ahead(self.samples_generator, position["episode"], position["total_consumed_prompts"])
        first: Played = {}
        evaluates = self.args.eval.steps != float("inf")
        if evaluates:
            first = self.heldout.read(0, both=True) if global_step else self.evaluate(0, both=True)[1]
        latest: Played = {}
        if position["evaluated"] == global_step:
            latest = self.heldout.read(global_step, both=global_step >= self.planned_steps)
        bar = tqdm(total=self.planned_steps, initial=global_step, desc="GOPO", unit="step", dynamic_ncols=True)
        for batch in self.rollouts:
            status, global_step = self.train_step(batch.samples, global_step)
            status["timing/rollout"] = batch.seconds
            if batch.pass_rate is not None:
                status["dynamic_filtering_pass_rate"] = batch.pass_rate
            position |= {"episode": batch.episode, "total_consumed_prompts": batch.consumed}
            position["global_step"] = global_step
            latest = self._close_step(status, position, batch)
            shown = {name: status.get(f"rollout/{name}", math.nan) for name in ("tse", "success")}  # nan: all failed
            bar.set_postfix(tse=f"{shown['tse']:.1f}", success=f"{shown['success']:.2f}")
            bar.update()
        bar.close()
        last = latest | self.evaluate(global_step, both=True, known=latest)[1] if evaluates else {}
        for tracker in (self.wandb_logger, self.tensorboard_logger):
            if tracker:
                tracker.close()
        phases = {"before training": first, "after training": last}
        return {(name, one): dialogues for name, played in phases.items() for one, dialogues in played.items()}

    def _close_step(self, status: dict[str, Any], position: dict[str, Any], batch: Batch) -> Played:
        """Log a step, then evaluate and save where they are due; returns the dialogues of the evaluation."""
        global_step, best = position["global_step"], False
        played: Played = {}
        self.log_metrics(global_step, status)
        self._track(global_step, status | self._example(batch.samples))
        if global_step % self.args.eval.steps == 0:
            logs, played = self.evaluate(global_step, both=global_step >= self.planned_steps)
            best, position["evaluated"] = self.is_best(logs), global_step
        # After the evaluation: a run that goes on from this step would not do it again.
        if best:
            self.checkpoints.save(self, f"best_global_step{global_step}", position, batch.snapshot)
        if global_step % self.args.ckpt.save_steps == 0:
            self.checkpoints.save(self, f"global_step{global_step}", position, batch.snapshot)
        return played

    def train_step(self, samples: list[DialogueSample], global_step: int) -> tuple[dict[str, Any], int]:
        """The roles whose turn it is learn from ``samples``, then their engines get the new weights."""
        status = rollout_metrics(samples, self.config, self.num_labels, global_step)
        start = time.time()
        roles = self.config.learners(global_step)
        learners = [self.learners[role] for role in roles]
        if self.config.own_expert:
            # On devices of their own the roles learn at the same time; on the same devices, one after the other.
            with ThreadPoolExecutor(1 if self.args.train.colocate_all else len(roles)) as pool:
                for learned in pool.map(lambda one: one.update(one.experiences(samples), global_step), learners):
                    status.update(learned)
        else:  # one model in both roles: what it learns from is made before either role changes it
            for learner, made in [(learner, learner.experiences(samples)) for learner in learners]:
                status.update(learner.update(made, global_step))
        status["timing/learn"] = time.time() - start
        start = time.time()
        self._switch(roles, global_step + 1)
        status["timing/sync"] = time.time() - start
        status["rollout/engine_restarts"] = float(self.restarts.take_count())
        return status, global_step + 1

    def _switch(self, roles: tuple[str, ...], version: int) -> None:
        """Give the engines the weights of ``version``: of both roles before any dialogue meets one of them.

        Dialogues under way wait at the gates of their rollout actors (--train.partial_rollout_enable); without it there
        are none, or they are awaited.
        """
        if not self.args.train.partial_rollout_enable:
            with self.rollouts.rolling:
                self.broadcast_to_vllm(roles)
                self.samples_generator.version = version
            return
        self._gates(Switch(None))
        self.broadcast_to_vllm(roles)
        self.samples_generator.version = version
        self._gates(Switch(version))

    def _gates(self, switch: Switch) -> None:
        """Send to every rollout actor that hosts dialogues; returns when all have obeyed."""
        call = {"prompt": "", "label": switch, "sampling_params": None, "max_length": 0, "hf_tokenizer": None}
        ray.get([engine.generate_responses.remote(**call) for engine in self.samples_generator.vllm_engines])

    def broadcast_to_vllm(self, roles: tuple[str, ...] | None = None) -> None:
        """Send the weights of ``roles`` (None: all) to their engines; with sharing there is one set of both."""
        for name in (roles or self.config.roles) if self.config.own_expert else (RESPONDER,):
            self.learners[name].broadcast_to_vllm()

    def evaluate(
        self, global_step: int, *, both: bool = False, known: Played | None = None
    ) -> tuple[dict[str, float], Played]:
        """Play the held-out goals with the current weights, see ``HeldOut.play``; logs and returns what is new."""
        with self.rollouts.rolling:
            played = self.heldout.play(global_step, both=both, known=known or {})
        logs = self.heldout.metrics(played)
        if logs:
            self.log_metrics(global_step, logs)
        for tracker in (self.wandb_logger, self.tensorboard_logger):
            if tracker and logs:
                tracker.log_eval(global_step, logs)
        return logs, played

    def is_best(self, logs: dict[str, float]) -> bool:
        """Whether an evaluation is the best so far, by --ckpt.best_metric_key; remembers it."""
        key = self._detect_eval_metric_key(logs)
        if key is None or key not in logs:
            return False
        self._latest_eval_metric_value = logs[key]
        if not logs[key] > self.best_eval_metric_value:
            return False
        self.best_eval_metric_value = logs[key]
        return True

    def _track(self, global_step: int, status: dict[str, Any]) -> None:
        for tracker in (self.wandb_logger, self.tensorboard_logger):
            if tracker and global_step % self.args.logger.logging_steps == 0:
                tracker.log_train(global_step, status)

    def _example(self, samples: list[DialogueSample]) -> dict[str, Any]:
        """One dialogue for W&B and TensorBoard, under upstream's name: (text, the responder's return)."""
        kept = [s for s in samples if not s.quarantined]
        return {"generated_samples": (as_text(kept[0].trajectory), kept[0].returns[RESPONDER])} if kept else {}

    def log_metrics(self, global_step: int, status: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        record = {"global_step": global_step, "time": time.time(), **status}
        append_line(self.results / "metrics.jsonl", json.dumps(record).encode("ascii") + b"\n")
        logger.debug("step %d: %s", global_step, status)
