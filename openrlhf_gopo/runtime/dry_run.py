"""What a run would do, from flags, data and tokenizers alone: no Ray, no GPU, no weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.envs import Environment
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.runtime import memory
from openrlhf_gopo.runtime.checks import batches_of, gpus_needed
from openrlhf_gopo.runtime.requests import build_policy, policy_spec
from openrlhf_gopo.types import StopReason

DIALOGUES = 64  # about as many scripted dialogues are measured
SKILL = 0.5


def describe(args: SimpleNamespace, config: GopoConfig, env: Environment, policy: TwoLevelPolicy) -> str:
    """The report of ``--gopo.dry_run``, several lines."""
    train, heldout = len(env.goals("train")), len(env.goals("heldout"))
    lines, longest, share = _streams(args, config)
    return "\n".join(
        [
            f"dry run: {env.name}: {train} training and {heldout} held-out goals, {len(policy.labels)} labels, "
            f"{gpus_needed(args, config)} GPUs; everything checked",
            *_batches(args, config, min(train, args.data.max_samples)),
            *lines,
            *memory.report(args, config, longest, share),
        ]
    )


def _batches(args: SimpleNamespace, config: GopoConfig, goals: int) -> list[str]:
    """Goals, dialogues, optimizer steps and micro-batches of one training step and of the whole run."""
    size, k = args.rollout.batch_size, args.rollout.n_samples_per_prompt
    steps = goals // size * args.train.num_episodes
    lines = [
        f"a step: {size} goals x {k} dialogues = {size * k}; {steps} steps in {args.train.num_episodes} pass(es) over "
        f"{goals} goals"
    ]
    for role in config.roles if config.own_expert else (RESPONDER,):
        where = args.expert if role == EXPERT else args.actor
        dialogues, passes = batches_of(args, role, config)
        ranks = where.num_nodes * where.num_gpus_per_node // args.ds.tensor_parallel_size
        micro = "by tokens" if args.train.dynamic_batch_enable else args.train.micro_batch_size
        steps = size * k // dialogues * passes
        lines.append(
            f"  {role}: {steps} optimizer step(s) of {dialogues} dialogues on {ranks} rank(s), "
            f"micro-batch {micro}, lr {where.adam.lr:g}"
        )
    return lines


def _streams(args: SimpleNamespace, config: GopoConfig) -> tuple[list[str], dict[str, int], dict[str, float]]:
    """Stream lengths of scripted dialogues with the environment's own users: an endpoint is not asked for them.

    Returns:
        The report; by role the tokens of the longest one, at most --data.max_len; by role the share of its tokens that
        were actions, at most.
    """
    env, policy = build_policy(replace(policy_spec(args, config), user=None))
    train, script = env.goals("train"), ScriptedPolicy(SKILL, args.train.seed)
    sample = train[:: max(len(train) // DIALOGUES, 1)]  # over all of them: longer goals may stand together
    tried = [play(env, goal, 0, args.train.seed, script) for goal in sample]
    played = [trajectory for trajectory in tried if trajectory.stop is not StopReason.FAILED]
    if not played:
        raise DialogueError(f"--gopo.env {config.env}: no scripted dialogue could be played: {tried[0].error}")
    lengths: dict[str, list[int]] = {role: [] for role in policy.roles}
    share = dict.fromkeys(policy.roles, 0.0)
    for trajectory in played:
        for role, stream in policy.replay(trajectory, env.catalogue(trajectory.goal)).items():
            lengths[role].append(len(stream.tokens))
            actions = sum(end - start for start, end in stream.spans)
            share[role] = max(share[role], actions / len(stream.tokens))
    lines = [
        f"tokens of a stream in {len(played)} scripted dialogues with reference replies (--data.max_len "
        f"{args.data.max_len}, a reply at most {config.reply_max_tokens}):"
    ]
    for role, found in lengths.items():
        half, most, nearly, longest = np.percentile(found, [50, 90, 99, 100]).astype(int)
        goal = played[int(np.argmax(found))].goal.id
        over = sum(length > args.data.max_len for length in found)
        lines.append(
            f"  {role}: median {half}, 90% {most}, 99% {nearly}, longest {longest} (goal {goal})"
            + (f"; {over} would end in max_tokens: raise --data.max_len" if over else "")
        )
    return lines, {role: min(max(found), args.data.max_len) for role, found in lengths.items()}, share
