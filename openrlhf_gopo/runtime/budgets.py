"""What the environment's data must have, and what its dialogues need, known before Ray starts."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.rewards.custom import RewardSpec, load_rewards
from openrlhf_gopo.types import Goal


def check_dialogues(args: SimpleNamespace, config: GopoConfig, env: Environment, policy: TwoLevelPolicy) -> None:
    """Data and token budgets: enough goals for a batch, and room for one turn in both streams of every goal. Rewards.

    Raises:
        ConfigError: too few goals, or --data.max_len cannot hold one turn.
        DialogueError: a reward of --gopo.reward fails on a scripted dialogue.
    """
    train, heldout = env.goals("train"), env.goals("heldout")
    usable = min(len(train), args.data.max_samples)
    if usable < args.rollout.batch_size:
        raise ConfigError(
            f"--rollout.batch_size {args.rollout.batch_size}: {env.name} has {usable} training goals; lower it"
        )
    if args.eval.steps > 0 and not heldout:
        raise ConfigError(f"--eval.steps {args.eval.steps}: {env.name} has no held-out goals; leave the flag out")
    check_budget(args, config, env, policy, (*train, *heldout))
    _try_rewards(config, train[0])


def check_budget(
    args: SimpleNamespace, config: GopoConfig, env: Environment, policy: TwoLevelPolicy, goals: Iterable[Goal]
) -> None:
    """Room for one turn in both streams, for the goal with the longest context of every intent.

    Raises:
        ConfigError: --data.max_len cannot hold one turn.
    """
    longest = {goal.intent: goal for goal in sorted(goals, key=lambda goal: len(goal.context))}
    for goal in longest.values():
        _check_first_turn(args, config, env, policy, goal)


def _check_first_turn(args, config, env, policy, goal) -> None:
    catalogue = env.catalogue(goal)
    opening = env.start(goal, seed=0).opening
    expert, responder = policy.streams(goal, catalogue)
    expert.ask(expert.message(policy.decision_text(None, opening.user)))
    expert.force(next(iter(policy.labels.values())))
    needs = {"expert": len(expert.stream.tokens) + policy.room_to_plan()}
    orders = (responder.message(policy.reply_text(opening.user, strategy, "")) for strategy in catalogue)
    needs["responder"] = len(responder.stream.tokens) + max(map(len, orders)) + config.reply_max_tokens
    for role, tokens in needs.items():
        if tokens > args.data.max_len:
            raise ConfigError(
                f"--data.max_len {args.data.max_len}: the {role}'s first turn of goal {goal.id} needs {tokens} tokens "
                f"(--gopo.reply_max_tokens {config.reply_max_tokens} included); raise --data.max_len"
            )


def _try_rewards(config: GopoConfig, goal: Goal) -> None:
    """Score one scripted dialogue with the rewards that send no requests, and with the environment's own user."""
    local = [reward for reward in load_rewards(RewardSpec.of(config)).further if not reward.asks]
    if local:
        played = play(load_environment(config.env, config.data), goal, 0, 0, ScriptedPolicy())
        for reward in local if played.turns else ():
            reward(played)
