"""Run by test_checkpoint.py, once per data-parallel rank: a model's half of a checkpoint set, with real DeepSpeed.

A model takes a step, is saved, and takes another; a second one loads what was saved and takes the other too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from openrlhf_gopo import platform

platform.activate()

import deepspeed  # noqa: E402
import torch  # noqa: E402
from openrlhf.trainer.ray.ppo_critic import CriticModelActor  # noqa: E402
from parallel_script import experience, partitioned  # noqa: E402

from openrlhf_gopo.cli import train_gopo  # noqa: E402
from openrlhf_gopo.config import RESPONDER  # noqa: E402
from openrlhf_gopo.runtime.actors import RolePolicyActor  # noqa: E402
from openrlhf_gopo.runtime.checkpoints.random_states import random_states  # noqa: E402
from openrlhf_gopo.runtime.roles import role_args, role_strategy  # noqa: E402

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def main(folder: str, cases: str) -> None:
    """Every case on every rank; rank 0 writes what came out."""
    results = {}
    for name, flags in json.loads(cases).items():
        print(f"case {name}", flush=True)
        results[name] = run(folder, name, flags)
    if RANK == 0:
        torch.save(results, Path(folder, f"ranks{WORLD}.pt"))


def run(folder: str, name: str, flags: dict[str, str]) -> dict[str, Any]:
    """Weights after one step, after two, and after the second one alone from the checkpoint; and what was kept."""
    dialogues = torch.load(Path(folder, "dialogues.pt"))["mixed"]
    size = len(dialogues) // WORLD
    mine = dialogues[RANK * size : (RANK + 1) * size]
    flags = flags | {"--ckpt.path": f"{folder}/ckpt_{name}"}
    whole = build(folder, flags, tag=None)
    first = step(whole, mine)
    for tag in ("global_step1", "best_global_step1", "global_step1b"):  # upstream would let the first ones go
        whole.save_checkpoint(tag=tag)
    drawn = random_states()["torch"]
    second = step(whole, mine)
    close(whole)
    resumed = build(folder, flags, tag="global_step1")
    at_start = weights(resumed)
    same_draws = bool(random_states()["torch"].equal(drawn))
    again = step(resumed, mine)
    lr = (whole.scheduler.get_last_lr(), resumed.scheduler.get_last_lr())
    close(resumed)
    return {"first": first, "second": second, "at_start": at_start, "again": again, "draws": same_draws, "lr": lr}


def build(folder: str, flags: dict[str, str], tag: str | None) -> Any:
    """The Ray actor's plain class, without Ray; it loads set ``tag`` if there is one to load."""
    needed = {"--gopo.env": "shop", "--actor.model_name_or_path": folder}
    words = [word for name, value in (needed | flags).items() for word in (name, *value.split())]
    args, config = train_gopo.parse(words)
    own = role_args(args, RESPONDER, config)
    own.ckpt.load_enable, own.ckpt.tag = tag is not None, tag
    strategy = partitioned(role_strategy(own))
    critic = own.algo.advantage.estimator == "gae"
    cls = (CriticModelActor if critic else RolePolicyActor).__ray_metadata__.modified_class
    actor = cls(WORLD, RANK, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if critic:
        actor.init_model_from_pretrained(strategy, folder, max_steps=10)
    else:
        actor.init_model_from_pretrained(strategy, folder, max_steps=10, vllm_engines=None)
    actor.engine = actor.critic if critic else actor.actor.model
    actor.scheduler = actor.critic_scheduler if critic else actor.actor_scheduler
    return actor


def step(actor: Any, dialogues: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One rollout's updates, in an order that is drawn; the weights after it."""
    for dialogue in dialogues:
        sample = experience(dialogue)
        sample.values = torch.zeros_like(sample.action_log_probs)
        sample.returns = sample.advantages
        actor.append(sample)
    actor.fit() if hasattr(actor, "critic") else actor.fit(kl_ctl=0.0)
    return weights(actor)


def weights(actor: Any) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    found = {}
    for name, parameter in actor.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=actor.strategy.stage == 3):
            found[name] = parameter.detach().clone()
    return found


def close(actor: Any) -> None:
    actor.engine.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
