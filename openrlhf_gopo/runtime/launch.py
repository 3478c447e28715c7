"""Puts the roles on the cluster and trains them: upstream's ``train(args)`` for two policies."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
from openrlhf.trainer.ray import create_vllm_engines, vllm_engine
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.utils import get_strategy, get_tokenizer
from ray.util.placement_group import placement_group
from transformers import set_seed

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.evaluation.decoding import Rows
from openrlhf_gopo.rewards.custom import RewardSpec, load_rewards
from openrlhf_gopo.rewards.joint import parse_weights
from openrlhf_gopo.rewards.turns import split_weights
from openrlhf_gopo.rollout.sampled import ReplyGroup, TokenLimits
from openrlhf_gopo.runtime import agent
from openrlhf_gopo.runtime.actors import RoleCriticActor, RolePolicyActor, RoleReferenceActor
from openrlhf_gopo.runtime.checkpoints.checkpoint import Checkpoints
from openrlhf_gopo.runtime.checks import gpus_needed
from openrlhf_gopo.runtime.cluster import init_ray
from openrlhf_gopo.runtime.liveness import watched
from openrlhf_gopo.runtime.models import substituted
from openrlhf_gopo.runtime.requests import build_policy, policy_spec
from openrlhf_gopo.runtime.restarts import rollout_actor
from openrlhf_gopo.runtime.roles import Role, make_roles
from openrlhf_gopo.runtime.samples_generator import RolloutSpec
from openrlhf_gopo.runtime.trainer import GOPOTrainer


def rollout_spec(args: SimpleNamespace, config: GopoConfig) -> RolloutSpec:
    """What a dialogue needs, from the flags."""
    metrics = load_rewards(RewardSpec.of(config)).metrics
    rewards = {EXPERT: config.expert_reward, RESPONDER: config.responder_reward}
    weights = {role: parse_weights(rewards[role], metrics) for role in config.roles}
    group = None
    if config.reply_group > 1:
        own, weights[RESPONDER] = split_weights(weights[RESPONDER])
        group = ReplyGroup(config.reply_group, own)
    limits = TokenLimits(
        max_len=args.data.max_len,
        max_turns=config.max_turns,
        reply_max_tokens=config.reply_max_tokens,
        user_timeout=config.user_timeout,
        responder_top_p=args.rollout.top_p,
        reply_group=group,
    )
    return RolloutSpec(policy_spec(args, config), limits, weights, config, args.train.seed)


def train(args: SimpleNamespace, config: GopoConfig, results: Path) -> Rows:
    """Build both roles, train them, save them; returns the held-out dialogues before and after, by decoding."""
    clock = [psutil.Process().create_time(), time.time()]
    checkpoints = Checkpoints(args, config, results)
    checkpoints.open()
    # Not in a thread beside the imports: import locks and logging's lock, taken in two orders, hung a start.
    init_ray(gpus_needed(args, config), config.worker_logs)
    clock.append(time.time())
    roles = make_roles(args, config)
    place(roles, args, config)
    env, policy = build_policy(policy_spec(args, config))
    spec = rollout_spec(args, config)
    fast = not args.data.disable_fast_tokenizer
    tokenizers = {
        name: get_tokenizer(role.args.actor.model_name_or_path, None, "left", role.strategy, use_fast=fast)
        for name, role in roles.items()
    }
    set_seed(args.train.seed)  # upstream seeds its actors, not the driver, which draws the order of the goals
    strategy, labels = get_strategy(args), len(policy.labels)
    trainer = GOPOTrainer(strategy, roles, env, config, spec, tokenizers, labels, results, checkpoints)
    checkpoints.apply(roles)
    with watched(roles, args.ckpt.path):
        load_models(roles, {name: trainer.scheduled_steps(name) for name in roles})
        clock.append(time.time())
        parts = [after - before for before, after in pairwise(clock)]
        timings = dict(zip(("timing/imports", "timing/ray", "timing/models"), parts, strict=True))
        trainer.log_metrics(checkpoints.resumed.step if checkpoints.resumed else 0, timings)
        rows = trainer.fit()
        save_models(roles, args)
    return rows


def save_models(roles: dict[str, Role], args: SimpleNamespace) -> None:
    """Write the trained models into --ckpt.output_dir."""
    saved = {id(role.actor): role for role in roles.values()}  # one model when shared
    ray.get([ref for role in saved.values() for ref in role.actor.async_save_model()])
    if args.critic.save_value_network:
        ray.get([ref for role in roles.values() if role.critic is not None for ref in role.critic.async_save_model()])


def place(roles: dict[str, Role], args: SimpleNamespace, config: GopoConfig) -> None:
    """Create groups and engines with upstream's placement: separate, actor with reference, or everything together."""
    everything = None
    if args.train.colocate_all:
        everything = placement(args.actor.num_nodes * args.actor.num_gpus_per_node)
    if not config.own_expert:
        only = roles[RESPONDER]
        _place_role(only, everything, config, policies=1)
        for role in roles.values():  # the expert too, where one model plays both
            role.actor, role.reference, role.engines = only.actor, only.reference, only.engines
        return
    for role in roles.values():
        _place_role(role, everything, config, policies=2)


def _place_role(role: Role, everything: Any, config: GopoConfig, *, policies: int) -> None:
    args = role.args
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    together = everything or (placement(ranks) if args.train.colocate_actor_ref else None)
    # Upstream gives each of actor, reference, critic and engine a fifth of a GPU; two policies share that one GPU.
    share = (0.2 if policies == 1 else 0.1) if everything else (0.2 if together else 1)
    copies = args.ds.ring_attn_size * args.ds.tensor_parallel_size
    # Engines that roll out while models learn stand on GPUs of their own, as upstream's do.
    # Ray's collectives cannot form a group anew, and weights that change under way are not those of a dialogue.
    fixed = args.train.async_enable or args.vllm.sync_with_ray
    role.engines = engines(
        args,
        args.actor.model_name_or_path,
        None if args.train.async_enable else everything,
        0 if fixed else config.engine_restarts,
    )

    def group(where: SimpleNamespace, actor_class: Any, bundle: Any, part: float) -> RayActorGroup:
        return RayActorGroup(
            where.num_nodes,
            where.num_gpus_per_node,
            actor_class,
            pg=bundle,
            num_gpus_per_actor=part,
            duplicate_actors=copies,
        )

    role.actor = group(args.actor, RolePolicyActor, together, share)
    if args.algo.kl.init_coef > 0:
        role.reference = group(args.ref, RoleReferenceActor, together, share)
    if args.critic.model_name_or_path:
        role.critic = group(args.critic, RoleCriticActor, everything, share if everything else 1)


def placement(gpus: int) -> Any:
    """A placement group of as many bundles of one GPU, ready."""
    bundles = [{"GPU": 1, "CPU": 1} for _ in range(gpus)]
    bundle = placement_group(bundles, strategy="PACK")
    ray.get(bundle.ready())
    return bundle


def engines(args: SimpleNamespace, model: str, everything: Any = None, restarts: int = 0) -> list:
    """``model`` in vLLM rollout actors that can host dialogues, each started again up to ``restarts`` times.

    Log-probabilities are those of the distribution that was sampled from. Weights are held in --ds.param_dtype.
    """
    with substituted(vllm_engine, RolloutRayActor=rollout_actor(restarts, args.ds.param_dtype)):
        return _engines(args, model, everything)


def _engines(args: SimpleNamespace, model: str, everything: Any) -> list:
    return create_vllm_engines(
        args.vllm.num_engines,
        args.vllm.tensor_parallel_size,
        model,
        args.train.seed,
        args.train.full_determinism_enable,
        args.vllm.enable_prefix_caching,
        args.vllm.enforce_eager,
        args.data.max_len,
        everything,
        args.vllm.gpu_memory_utilization,
        args.vllm.enable_sleep,
        "processed_logprobs",
        agent_func_path=agent.__file__,
    )


def load_models(roles: dict[str, Role], steps: dict[str, int]) -> None:
    """Load every model; ``steps``: optimizer steps of each role, of which a shared model takes all.

    Engines are watched: one that dies meanwhile would hang the weight-sync group.
    """
    refs, deaths = [], []
    for role in {id(r.actor): r for r in roles.values()}.values():
        max_steps = max(sum(steps[r.name] for r in roles.values() if r.actor is role.actor), 1)
        path = role.args.actor.model_name_or_path
        deaths += [engine.until_death.remote() for engine in role.engines]
        refs += role.actor.async_init_model_from_pretrained(role.strategy, path, max_steps, role.engines)
        if role.reference is not None:
            refs += role.reference.async_init_model_from_pretrained(role.strategy, path)
    while refs:  # whichever fails first is raised first
        done, _ = ray.wait([*refs, *deaths], num_returns=1)
        ray.get(done)
        refs = [ref for ref in refs if ref not in done]
    for ref in deaths:
        ray.cancel(ref)
    for role in roles.values():
        if role.critic is not None:
            path = role.args.critic.model_name_or_path
            ray.get(role.critic.async_init_model_from_pretrained(role.strategy, path, max(steps[role.name], 1)))
