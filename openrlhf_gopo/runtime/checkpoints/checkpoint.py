"""Saves and restores a run as checkpoint sets: what each holds of every role and of the driver.

A set of tag T below --ckpt.path: ``ROLE/_actor/T`` and ``ROLE/_critic/T`` (DeepSpeed's: weights, optimizer, scheduler,
and per rank its random states), ``trainer/T`` (data loader, the driver's random states, dialogues not yet trained on)
and ``T.manifest.json`` (position, counters, KL coefficients, best metric, lengths of the logs, flags). DeepSpeed reads
its files with pickle: resume only from folders you trust.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
import torch
from openrlhf.utils.logging_utils import init_logger
from ray.exceptions import RayActorError, RayTaskError

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.errors import CheckpointError, ConfigError
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.runtime.checkpoints.manifest import START, CheckpointFolder, CheckpointSet, unwritten
from openrlhf_gopo.runtime.checkpoints.random_states import restore_random_states
from openrlhf_gopo.runtime.checkpoints.resume import check_flags, cut_logs, log_offsets, recorded_flags
from openrlhf_gopo.runtime.roles import Role

if TYPE_CHECKING:
    from openrlhf_gopo.runtime.rollouts import Snapshot
    from openrlhf_gopo.runtime.trainer import GOPOTrainer

TRAINER = "trainer"  # the driver's folder beside those of the roles

logger = init_logger(__name__)


class Checkpoints:
    """The checkpoint sets of one run. ``resumed`` is the set that it goes on from, None for a new run."""

    def __init__(self, args: SimpleNamespace, config: GopoConfig, results: Path) -> None:
        self.args, self.results = args, results
        self.folder = CheckpointFolder(args.ckpt.path, args.ckpt.max_num, args.ckpt.max_mem)
        self.flags = recorded_flags(args, config)
        self.resumed: CheckpointSet | None = None

    def open(self) -> None:
        """Find where to go on, before anything is loaded; mark the beginning of a run where there is nothing.

        Raises:
            ConfigError: the newest complete set was written under flags that do not fit.
            CheckpointError: the folder cannot be written to.
        """
        if self.args.ckpt.load_enable:
            self._find()
        saves = self.args.ckpt.save_steps > 0 or self.args.eval.steps > 0
        if self.resumed is None and saves and not self.args.ckpt.disable_ds:
            self.folder.start({"logs": log_offsets(self.results)}, self.flags)

    def _find(self) -> None:
        found = self.folder.newest()
        if found is None:
            logger.warning("--ckpt.load_enable: no complete checkpoint in %s; starting over", self.folder.root)
            return
        if found.tag == START:
            older = [s.tag for s in self.folder.sets() if s.tag != START]
            if older:
                logger.warning(
                    "--ckpt.load_enable: the newest run in %s was stopped before its first checkpoint and starts over; "
                    "to go on from the earlier run's %s, remove %s.manifest.json",
                    *(self.folder.root, older[-1], START),
                )
        else:
            for notice in check_flags(found.flags, self.flags, found.tag):
                logger.warning("--ckpt.load_enable: %s", notice)
            if self.args.train.enable_ema:
                logger.warning("--train.enable_ema: checkpoints hold no moving average; it starts anew from the model")
        for notice in cut_logs(self.results, found.state["logs"]):
            logger.warning("%s", notice)
        self.resumed = found
        logger.info("--ckpt.load_enable: going on from %s of %s", found.tag, self.folder.root)

    def apply(self, roles: dict[str, Role]) -> None:
        """Tell the roles which folders to load, or that there are none.

        Raises:
            ConfigError: the set lacks a model that this run has.
        """
        loads = self.resumed is not None and self.resumed.tag != START
        for role in roles.values():
            role.args.ckpt.load_enable = loads
            role.args.ckpt.tag = self.resumed.tag if loads else None
        missing = sorted(set(self._parts(roles, self.resumed.tag)) - set(self.resumed.parts)) if loads else []
        if missing:
            raise ConfigError(
                f"--ckpt.load_enable: checkpoint {self.resumed.tag} has no {', '.join(missing)}; give the flags that "
                "it was written with (a critic needs --algo.advantage.estimator gae or critic in --gopo.expert_credit)"
            )

    @staticmethod
    def _parts(roles: dict[str, Role], tag: str) -> list[str]:
        """Folders of a set, relative to --ckpt.path. Roles that share a model share its folder."""
        parts = [f"{TRAINER}/{tag}"]
        for role in _models(roles):
            name = Path(role.args.ckpt.path).name
            parts.append(f"{name}/_actor/{tag}")
            if role.critic is not None:
                parts.append(f"{name}/_critic/{tag}")
        return parts

    def save(self, trainer: GOPOTrainer, tag: str, position: dict[str, Any], data: Snapshot) -> None:
        """Write a set: every model's folder, the driver's, then the manifest. ``data``: where the rollouts stood when
        they had made the batch that was trained on last.

        Raises:
            CheckpointError: something could not be written; complete sets are as they were.
        """
        roles = {name: learner.of for name, learner in trainer.learners.items()}
        if self.args.ckpt.disable_ds:  # --ckpt.save_hf may still export
            self._save_models(roles, tag)
            return
        parts = self._parts(roles, tag)
        self.folder.prepare(tag, parts)
        self._save_models(roles, tag)
        self._save_driver(data, self.folder.root / parts[0], tag)
        state = {
            "position": position,
            "samples": data.samples,
            "kl": {name: learner.kl_ctl.value for name, learner in trainer.learners.items()},
            "best": {
                "key": trainer.best_eval_metric_key,
                "value": _finite(trainer.best_eval_metric_value),
                "latest": _finite(trainer._latest_eval_metric_value),
            },
            "logs": log_offsets(self.results) | data.logs,
        }
        metric, step = state["best"]["latest"], position["global_step"]
        self.folder.commit(tag, step, parts, metric=metric, state=state, flags=self.flags)

    def _save_models(self, roles: dict[str, Role], tag: str) -> None:
        refs = []
        for role in _models(roles):
            refs += role.actor.async_run_method(method_name="save_checkpoint", tag=tag)
            if role.critic is not None:
                refs += role.critic.async_run_method(method_name="save_checkpoint", tag=tag)
        try:
            ray.get(refs)
        except RayTaskError as error:
            if isinstance(error, RayActorError):
                raise
            why = str(error).strip().splitlines()[-1]
            raise CheckpointError(unwritten(self.folder, tag, why)) from error

    def _save_driver(self, data: Snapshot, folder: Path, tag: str) -> None:
        states = {"loader": data.loader, "random": data.random}
        try:
            folder.mkdir(parents=True)
            torch.save(states, folder / "state.pt")
            for trajectory in data.buffered:
                append_trajectory(folder / "buffer.jsonl", trajectory)
        except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
            raise CheckpointError(unwritten(self.folder, tag, str(error).splitlines()[0])) from error

    def restore(self, trainer: GOPOTrainer) -> dict[str, Any]:
        """Put the driver back to where the set was written; the models have loaded theirs, the engines follow.

        Returns:
            The position: ``episode``, ``global_step``, ``total_consumed_prompts``, ``evaluated``.
        """
        found = self.resumed
        if found is None or found.tag == START:
            return {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "evaluated": None}
        trainer.broadcast_to_vllm()
        folder, state = self.folder.root / TRAINER / found.tag, found.state
        for name, value in state["kl"].items():
            if name in trainer.learners:
                trainer.learners[name].kl_ctl.value = value
        best = state["best"]
        trainer.best_eval_metric_key = best["key"] or trainer.best_eval_metric_key
        if best["value"] is not None:
            trainer.best_eval_metric_value = best["value"]
        trainer._latest_eval_metric_value = best["latest"]
        states = torch.load(folder / "state.pt", weights_only=True)
        trainer.goals_dataloader.load_state_dict(states["loader"])
        buffer = folder / "buffer.jsonl"
        trainer.samples_generator.restore(state["samples"], read_trajectories(buffer) if buffer.is_file() else [])
        restore_random_states(states["random"])  # last: the loader draws from them
        return state["position"]


def _models(roles: dict[str, Role]) -> list[Role]:
    """The roles with a model of their own: with sharing, the responder alone."""
    return list({id(role.actor): role for role in roles.values()}.values())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
