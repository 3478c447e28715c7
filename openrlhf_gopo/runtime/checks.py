"""Flags that can be known to be wrong before Ray starts. Each error names flag, value and remedy."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

from openrlhf_gopo.config import EXPERT, GopoConfig, PreferenceConfig
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.rewards.custom import RewardSpec, load_rewards
from openrlhf_gopo.rewards.joint import parse_weights
from openrlhf_gopo.rewards.turns import split_weights
from openrlhf_gopo.runtime.requests import check_determinism


def check_flags(args: SimpleNamespace, config: GopoConfig) -> None:
    """Combinations of flags that cannot work, and batch arithmetic.

    Raises:
        ConfigError: the first one found.
    """
    metrics = load_rewards(RewardSpec.of(config)).metrics
    for flag in ("expert_reward", "responder_reward"):
        try:
            parse_weights(getattr(config, flag), metrics)
        except ConfigError as error:
            raise ConfigError(f"--gopo.{flag}: {error}") from error
    if config.reply_group > 1:
        _check_reply_group(args, config, *split_weights(parse_weights(config.responder_reward, metrics)))
    _check_supported(args, config)
    _check_asynchronous(args)
    _check_lora(args)
    _check_placement(args, config)
    _check_batches(args, config)


def _check_reply_group(
    args: SimpleNamespace, config: GopoConfig, own: dict[str, float], rest: dict[str, float]
) -> None:
    """--gopo.reply_group: replies need scores of their own, and what else learns needs something to learn from."""
    flag, reward = f"--gopo.reply_group {config.reply_group}", f"--gopo.responder_reward {config.responder_reward}"
    if not own:
        raise ConfigError(
            f"{flag}: {reward} has nothing that scores one reply; add gre, realised, grounded or no_repetition"
        )
    if not rest and config.policy == "single_level":
        raise ConfigError(f"{flag}: with {reward} the decisions of single_level earn nothing; add tse or esndcg")
    if not rest and args.algo.advantage.estimator == "gae":
        raise ConfigError(
            f"{flag}: with {reward} a critic has nothing to value; add tse, or use "
            "--algo.advantage.estimator group_norm"
        )


def gpus_needed(args: SimpleNamespace, config: GopoConfig) -> int:
    """GPUs that all groups and engines together ask for."""
    actor = args.actor.num_nodes * args.actor.num_gpus_per_node
    engines = args.vllm.num_engines * args.vllm.tensor_parallel_size
    if config.own_expert:
        engines += (config.expert_num_engines or args.vllm.num_engines) * args.vllm.tensor_parallel_size
    if args.train.colocate_all:
        return actor + (engines if args.train.async_enable else 0)
    reference = args.ref.num_nodes * args.ref.num_gpus_per_node if args.algo.kl.init_coef > 0 else 0
    if args.train.colocate_actor_ref:
        reference = 0
    critics = bool(args.critic.model_name_or_path) + config.expert_has_critic
    critic = args.critic.num_nodes * args.critic.num_gpus_per_node * critics
    if config.own_expert:
        actor += args.expert.num_nodes * args.expert.num_gpus_per_node
        reference *= 2
    return actor + reference + critic + engines


def batches_of(args: SimpleNamespace, role: str, config: GopoConfig) -> tuple[int, int]:
    """Dialogues of one optimizer step of ``role``, and its passes over a rollout."""
    if role != EXPERT or config.expert_steps is None:
        return args.train.batch_size, args.train.max_epochs
    dialogues = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    return dialogues * config.expert_passes // config.expert_steps, config.expert_passes


def _check_supported(args: SimpleNamespace, config: GopoConfig) -> None:
    unsupported = {
        "--ds.ring_attn_size": (args.ds.ring_attn_size > 1, "the expert's decisions are not sliced over a ring"),
        "--data.max_images_per_prompt": (args.data.max_images_per_prompt > 0, "dialogues are text"),
        "--vllm.sync_with_ray": (
            args.vllm.sync_with_ray and config.own_expert,
            "upstream's group name is fixed, and two policies would share it",
        ),
    }
    for name, (given, why) in unsupported.items():
        if given:
            raise ConfigError(f"{name}: not supported: {why}; leave the flag out")
    if _has_critic(args, config) and args.train.dynamic_batch_enable and args.ds.zero_stage in (1, 2):
        raise ConfigError(
            f"--ds.zero_stage {args.ds.zero_stage}: with --train.dynamic_batch_enable upstream's critic would learn "
            "from the last micro-batch of each step alone (DeepSpeed keeps no other); use --ds.zero_stage 3 or 0"
        )
    check_determinism(args, config)
    if (args.vllm.num_engines or 0) < 1:
        raise ConfigError(f"--vllm.num_engines {args.vllm.num_engines}: dialogues need vLLM; give 1 or more")
    if args.algo.kl.target:
        raise ConfigError(
            f"--algo.kl.target {args.algo.kl.target}: an adaptive KL coefficient is not supported; drop it"
        )
    if config.pref.reference == "initial" and args.algo.kl.init_coef <= 0:
        raise ConfigError(
            "--gopo.pref.reference initial: there is no reference model with --algo.kl.init_coef 0; raise it, or use "
            "--gopo.pref.reference sampler"
        )
    _check_beta(config)
    _check_credit(args, config)
    if args.rollout.n_samples_per_prompt < 2 and config.policy == "two_level":
        raise ConfigError(
            f"--rollout.n_samples_per_prompt {args.rollout.n_samples_per_prompt}: preferences compare trajectories of "
            "one goal; give 2 or more"
        )


def _check_beta(config: GopoConfig) -> None:
    """With m = 0 for all, beta is one factor of all coefficients and is divided out again."""
    pref = config.pref
    if pref.reference == "sampler" and pref.beta != PreferenceConfig.beta:
        raise ConfigError(
            f"--gopo.pref.beta {pref.beta}: changes nothing with --gopo.pref.reference sampler, where it is one factor "
            "of all advantages, which have unit scale; drop it, or use --gopo.pref.reference initial"
        )


def _check_asynchronous(args: SimpleNamespace) -> None:
    """--train.async_enable: stale samples need their correction."""
    if not args.train.async_enable:
        return
    if args.train.async_queue_size < 1:
        raise ConfigError(f"--train.async_queue_size {args.train.async_queue_size}: give 1 or more")
    if args.algo.advantage.is_correction_level == "off":
        raise ConfigError(
            "--train.async_enable: dialogues are older than the weights that learn from them; add "
            "--algo.advantage.is_correction_level token (or seq)"
        )


def _check_credit(args: SimpleNamespace, config: GopoConfig) -> None:
    """Turn-level terms and what they cannot go with."""
    if config.expert_has_critic and config.sharing == "shared":
        raise ConfigError(
            f"--gopo.expert_credit {config.expert_credit}: a model that both roles share has no critic on decisions; "
            "use group or q in place of critic"
        )
    penalties = {
        "--reward.overlong_buffer_len": args.reward.overlong_buffer_len,
        "--reward.stop_properly_penalty_coef": args.reward.stop_properly_penalty_coef,
    }
    for name, value in penalties.items():
        if config.credit == "turn" and value is not None:
            raise ConfigError(
                f"{name} {value}: shapes the reward of a trajectory, --gopo.credit turn has one per turn; drop one"
            )


def _has_critic(args: SimpleNamespace, config: GopoConfig) -> bool:
    return bool(args.critic.model_name_or_path) or config.expert_has_critic


def _check_lora(args: SimpleNamespace) -> None:
    lora = args.ds.lora
    if lora.rank <= 0:
        return
    unsupported = {
        "--ds.tensor_parallel_size": (args.ds.tensor_parallel_size > 1, "PEFT's layers are not split over ranks"),
        "--ds.load_in_4bit": (args.ds.load_in_4bit, "vLLM holds whole weights, a 4-bit base cannot be sent to it"),
        # Upstream pairs the parameters of both by position (deepspeed.py:507), and its EMA model has no adapters.
        "--train.enable_ema": (args.train.enable_ema, "OpenRLHF 0.11.2 averages into a model without adapters"),
    }
    for name, (given, why) in unsupported.items():
        if given:
            raise ConfigError(f"{name}: not supported with --ds.lora.rank {lora.rank}: {why}; drop one")
    if lora.target_modules in ([], ["all-linear"]):  # PEFT knows the keyword as a string only, the default
        raise ConfigError(
            f"--ds.lora.target_modules {' '.join(lora.target_modules)}: leave the flag out for all linear layers, or "
            "name modules, as in q_proj v_proj"
        )


def _check_placement(args: SimpleNamespace, config: GopoConfig) -> None:
    roles = {"actor": args.actor} | ({"expert": args.expert} if config.own_expert else {})
    for name, role in roles.items():
        if not role.model_name_or_path:
            raise ConfigError(f"--{name}.model_name_or_path: missing; name a Hugging Face model or folder")
        if (Path(role.model_name_or_path) / "adapter_config.json").is_file():
            raise ConfigError(
                f"--{name}.model_name_or_path {role.model_name_or_path}: is a LoRA adapter, not a model; merge it "
                "first: python -m openrlhf.cli.lora_combiner --model_path BASE --lora_path ADAPTER --output_path MERGED"
            )
        ranks = role.num_nodes * role.num_gpus_per_node
        colocated = args.train.colocate_all or args.train.colocate_actor_ref
        if colocated and args.algo.kl.init_coef > 0 and ranks != args.ref.num_nodes * args.ref.num_gpus_per_node:
            raise ConfigError(
                f"--{name}.num_gpus_per_node {role.num_gpus_per_node}: colocation needs as many ranks as --ref.* has "
                f"({args.ref.num_nodes * args.ref.num_gpus_per_node}), got {ranks}"
            )
        engines = (config.expert_num_engines if name == "expert" else None) or args.vllm.num_engines
        hybrid = args.train.colocate_all and not args.train.async_enable
        if hybrid and ranks != engines * args.vllm.tensor_parallel_size:
            raise ConfigError(
                f"--train.colocate_all: {name} has {ranks} ranks and {engines} engines of "
                f"{args.vllm.tensor_parallel_size}; they must cover the same GPUs"
            )
    if args.train.colocate_all:
        _check_same_gpus(args, config, roles)
    if args.train.colocate_all and not args.train.async_enable and len(roles) == 2:
        share, expert = args.vllm.gpu_memory_utilization, config.expert_gpu_memory_utilization
        both = share + (expert or share)
        if both > 1:
            own = f" and --gopo.expert_gpu_memory_utilization {expert}" if expert else ""
            raise ConfigError(
                f"--vllm.gpu_memory_utilization {share}{own}: with --train.colocate_all two engines share each GPU and "
                f"ask for {both:.2f} of it; lower {'them below 1 together' if expert else 'it below 0.5'}"
            )


def _check_same_gpus(args: SimpleNamespace, config: GopoConfig, roles: dict[str, SimpleNamespace]) -> None:
    """With --train.colocate_all every group stands on the GPUs of --actor.*."""
    actor = args.actor.num_nodes * args.actor.num_gpus_per_node
    groups = roles | ({"critic": args.critic} if _has_critic(args, config) else {})
    for name, group in groups.items():
        ranks = group.num_nodes * group.num_gpus_per_node
        if ranks != actor:
            raise ConfigError(
                f"--{name}.num_gpus_per_node {group.num_gpus_per_node}: with --train.colocate_all every group stands "
                f"on the {actor} GPUs of --actor.*, got {ranks} ranks; give both the same"
            )


def _check_steps(args: SimpleNamespace, config: GopoConfig) -> None:
    """``--gopo.expert_steps`` cuts the passes of the expert, and of its critic, into equal optimizer steps."""
    steps, passes = config.expert_steps, config.expert_passes
    if steps is None:
        return
    given = f"--gopo.expert_steps {steps}"
    if config.sharing == "shared":
        raise ConfigError(f"{given}: with --gopo.sharing shared one model takes its steps for both roles; leave it out")
    if args.train.dynamic_batch_enable:
        raise ConfigError(f"{given}: not with --train.dynamic_batch_enable, which cuts batches by tokens; drop one")
    dialogues = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    groups = [args.expert, *([args.critic] if config.expert_has_critic else [])]
    ranks = math.lcm(*(g.num_nodes * g.num_gpus_per_node // args.ds.tensor_parallel_size for g in groups))
    unit = args.train.micro_batch_size * ranks
    fitting = [n * passes for n in range(1, dialogues + 1) if dialogues % n == 0 and dialogues // n % unit == 0]
    if steps not in fitting:
        raise ConfigError(
            f"{given}: --gopo.expert_passes {passes} over the {dialogues} dialogues of a rollout cannot be cut into as "
            f"many equal steps of whole micro-batches ({unit} dialogues over all ranks); "
            + (f"use one of {fitting}" if fitting else "lower --train.micro_batch_size")
        )


def _check_batches(args: SimpleNamespace, config: GopoConfig) -> None:
    samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    if samples % args.train.batch_size:
        raise ConfigError(
            f"--train.batch_size {args.train.batch_size}: does not divide the {samples} dialogues of one rollout "
            "(--rollout.batch_size x --rollout.n_samples_per_prompt); the rest would never be trained on"
        )
    groups = ["actor", "expert"] if config.own_expert else ["actor"]
    for name in [*groups, *(["critic"] if _has_critic(args, config) else [])]:
        role = getattr(args, name)
        ranks = role.num_nodes * role.num_gpus_per_node // args.ds.tensor_parallel_size
        if ranks < 1:
            raise ConfigError(
                f"--{name}.num_gpus_per_node {role.num_gpus_per_node}: fewer than --ds.tensor_parallel_size "
                f"{args.ds.tensor_parallel_size} of one copy of the model; raise it"
            )
        if args.rollout.batch_size % ranks:
            raise ConfigError(
                f"--rollout.batch_size {args.rollout.batch_size}: goals do not divide over the {ranks} ranks of "
                f"--{name}.*; a group must stay whole on one rank"
            )
        steps_of_its_own = name == EXPERT and config.expert_steps is not None
        if args.train.batch_size % ranks and not steps_of_its_own:
            raise ConfigError(
                f"--train.batch_size {args.train.batch_size}: does not divide over the {ranks} ranks of --{name}.*; "
                "the rest would never be trained on"
            )
        if not args.train.dynamic_batch_enable:
            local = samples // ranks
            for flag in ("rollout", "train"):
                micro = getattr(args, flag).micro_batch_size
                if local % micro:
                    raise ConfigError(
                        f"--{flag}.micro_batch_size {micro}: does not divide the {local} dialogues of a rank of "
                        f"--{name}.*; choose a divisor"
                    )
            if args.train.batch_size % (args.train.micro_batch_size * ranks) and not steps_of_its_own:
                raise ConfigError(
                    f"--train.batch_size {args.train.batch_size}: is not a multiple of --train.micro_batch_size "
                    f"{args.train.micro_batch_size} x {ranks} ranks of --{name}.*"
                )
    _check_steps(args, config)
