"""What travels to a rollout actor with each group of dialogues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from types import SimpleNamespace
from typing import Any

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy
from openrlhf_gopo.rewards.custom import RewardSpec
from openrlhf_gopo.rollout.dialogue import dialogue_seed, seed_of
from openrlhf_gopo.rollout.sampled import TokenLimits
from openrlhf_gopo.types import Goal
from openrlhf_gopo.users import UserSpec


@dataclass(frozen=True)
class PolicySpec:
    """What identifies environment and policy in every process: names and paths, cheap to send and to hash."""

    env: str
    data: str | None
    expert_path: str
    responder_path: str
    labels: str | None
    names_only: bool
    single_level: bool = False
    plan_tokens: int = 0
    use_fast: bool = True
    user: UserSpec | None = None


@dataclass(frozen=True)
class Switch:
    """Sent to a rollout actor around a change of weights: ``version`` None closes its gate, a number opens it again."""

    version: int | None


@dataclass
class DialogueRequest:
    """One group: K dialogues about ``goal``. ``expert_engine`` is None when one engine serves both roles.

    ``deterministic``: every token is drawn from a seed of its own, and dialogues of one engine take turns, so that what
    a model computes does not depend on what else is in its batch. ``version``: updates that the weights have had.
    ``per_turn``: weights may change between its turns, not only between dialogues (--gopo.version_switch).
    """

    goal: Goal
    spec: PolicySpec
    limits: TokenLimits
    seed: int
    common_random_numbers: bool
    attempts: int
    rewards: RewardSpec = field(default_factory=RewardSpec)
    deterministic: bool = False
    version: int = 0
    per_turn: bool = False
    expert_engine: Any = None
    _claimed: int = field(default=0, repr=False)

    def claim(self) -> int:
        """The next sample index: upstream starts K executions with one and the same request."""
        self._claimed += 1
        return self._claimed - 1

    def dialogue_seed(self, sample: int) -> int:
        """Seed of the user simulator: of (run, goal, sample), or of (run, goal) with common random numbers."""
        return dialogue_seed(self.seed, self.goal, 0 if self.common_random_numbers else sample)

    def sampling_seeds(self, sample: int, role: str) -> Iterator[int | None]:
        """One seed per call of the role's engine; None (the engine's own generator) unless ``deterministic``."""
        for call in count():
            yield seed_of(f"{self.seed}:{self.goal.id}:{sample}:{role}:{call}") if self.deterministic else None


def check_determinism(args: SimpleNamespace, config: GopoConfig) -> None:
    """``--train.full_determinism_enable``: what an engine computes must not depend on what it computed before.

    Raises:
        ConfigError: flags under which it would.
    """
    if not args.train.full_determinism_enable:
        return
    if args.vllm.enable_prefix_caching:
        raise ConfigError(
            "--vllm.enable_prefix_caching: with --train.full_determinism_enable the rounding of a prompt would depend "
            "on what is in the cache; leave one out"
        )
    engines = config.expert_num_engines or args.vllm.num_engines
    if config.own_expert and engines != args.vllm.num_engines:
        raise ConfigError(
            f"--gopo.expert_num_engines {engines}: with --train.full_determinism_enable every engine of the responder "
            f"needs an engine of the expert for itself; give --vllm.num_engines {args.vllm.num_engines}"
        )


def policy_spec(args: SimpleNamespace, config: GopoConfig) -> PolicySpec:
    """Environment and tokenizers by name, from the flags."""
    return PolicySpec(
        config.env,
        config.data,
        (args.expert if config.own_expert else args.actor).model_name_or_path,
        args.actor.model_name_or_path,
        config.labels,
        config.names_only,
        config.policy == "single_level",
        config.expert_plan_tokens if config.expert_mode == "plan" else 0,
        not args.data.disable_fast_tokenizer,
        UserSpec(config.user, config.llm, config.user_timeout) if config.user else None,
    )


@lru_cache(maxsize=2)
def build_policy(spec: PolicySpec) -> tuple[Environment, TwoLevelPolicy]:
    """Load environment, tokenizers and templates once per process.

    Raises:
        ConfigError, DataError, StreamError: the spec names something unusable.
    """
    env = load_environment(spec.env, spec.data, spec.user)
    responder = load_tokenizer("--actor.model_name_or_path", spec.responder_path, spec.use_fast)
    same = spec.expert_path == spec.responder_path
    expert = responder if same else load_tokenizer("--expert.model_name_or_path", spec.expert_path, spec.use_fast)
    policy = SingleLevelPolicy if spec.single_level else TwoLevelPolicy
    return env, policy(expert, responder, env.catalogue_size(), spec.labels, spec.names_only, spec.plan_tokens)


def load_tokenizer(flag: str, path: str, use_fast: bool = True) -> Any:
    """The tokenizer of the model that ``flag`` named.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer  # not upstream's wrapper: a dry run needs no OpenRLHF import

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=use_fast)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"{flag} {path}: no tokenizer there ({why}); name a model or its folder") from error
