"""The ``--gopo.*`` flags as dataclasses: one field is one flag, its default and its help. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from openrlhf_gopo.config_llm import JudgeConfig, LlmConfig
from openrlhf_gopo.flag import check_values as _check_values
from openrlhf_gopo.flag import default, flag, flags
from openrlhf_gopo.flag import require as _require

__all__ = [
    "EXPERT",
    "RESPONDER",
    "GopoConfig",
    "JudgeConfig",
    "LlmConfig",
    "PreferenceConfig",
    "default",
    "flags",
    "from_flags",
]

EXPERT, RESPONDER = "expert", "responder"
CREDIT_TERMS = ("preference", "decision_preference", "q", "group", "critic")


@dataclass(frozen=True)
class PreferenceConfig:
    """``--gopo.pref.*``: the expert's trajectory-level preference loss (ours, see ``core.preference``)."""

    beta: float = flag(1.0, "sharpness of the preference: L = -log sigmoid(beta (m_w - m_l))")
    weights: str = flag("sum", "turn weights w_t of m(tau): 1, or 1/T", choices=("sum", "mean"))
    reference: str = flag(
        "sampler", "reference policy inside m(tau): the initial model or the sampler", choices=("sampler", "initial")
    )

    def __post_init__(self) -> None:
        _check_values(self, "gopo.pref")
        _require(self.beta > 0, "--gopo.pref.beta", self.beta, "give a positive number")


@dataclass(frozen=True)
class GopoConfig:
    """``--gopo.*``: everything that is not an upstream flag."""

    env: str = flag(
        None, "environment: shop, star, abcd, multiwoz, an entry point, or path/to/file.py:ClassName", kind=str
    )
    data: str = flag(
        None, "data of the environment (star, abcd, multiwoz: folder in upstream's layout; shop: en or zh)", kind=str
    )
    user: str = flag(
        None,
        "who words the customers: agenda (shop's own), replay (of star, abcd, multiwoz), llm:MODEL@URL "
        "(of OpenAI's API; URL as in http://localhost:8000/v1), an entry point, path/to/file.py:ClassName, or a "
        "mixture by weight, drawn per dialogue: agenda=0.7,llm:MODEL@URL=0.3; default: the environment's own",
        kind=str,
    )
    policy: str = flag(
        "two_level",
        "expert and responder; or single_level: the --actor.* model picks the strategy and writes the reply, and "
        "learns from --gopo.responder_reward by upstream's estimator alone (gae: PPO, group_norm: GRPO)",
        choices=("two_level", "single_level"),
    )
    sharing: str = flag(
        "separate", "two models, or one model in two roles with both losses", choices=("separate", "shared")
    )
    max_turns: int = flag(
        None, "turns after which a dialogue is truncated; default: the environment's, by goal", kind=int
    )
    reply_max_tokens: int = flag(64, "token cap of one reply")
    labels: str = flag(None, "comma-separated single-token strategy labels; default: A-Z, a-z, 0-9, AA-ZZ", kind=str)
    names_only: bool = flag(False, "show the expert the strategies' names without their descriptions: shorter streams")
    expert_mode: str = flag(
        "label",
        "what the expert decodes at a turn: the strategy's label, or a plan in its own words first",
        choices=("label", "plan"),
    )
    expert_plan_tokens: int = flag(48, "token cap of one plan with --gopo.expert_mode plan")
    expert_reward: str = flag("tse=1,esndcg=1", "expert's return: weighted sum of trajectory metrics")
    responder_reward: str = flag("tse=0.5,gre=1", "responder's return, same form")
    reward: str = flag(
        None,
        "further rewards, comma-separated: path/to/file.py:name, an entry point, judge:MODEL@URL (a language model of "
        "OpenAI's API), remote:URL (as --reward.remote_url); each adds metrics that --gopo.expert_reward and "
        "--gopo.responder_reward of train_gopo may name",
        kind=str,
    )
    reward_timeout: float = flag(60.0, "seconds one reward of --gopo.reward may take before the dialogue fails")
    expert_credit: str = flag(
        "group=1,q=1",
        "credit terms of the expert, as term=weight,term=weight: preference (of whole dialogues), decision_preference "
        "(of the decisions of one turn), q (a value per strategy, summed over the allowed ones), group (returns to go "
        "less the mean of the goal's other dialogues at that turn), critic (GAE on decisions)",
    )
    expert_steps: int = flag(
        None,
        "optimizer steps of the expert per rollout, in --gopo.expert_passes over its dialogues; default: upstream's "
        "batch arithmetic",
        kind=int,
    )
    expert_passes: int = flag(1, "passes of the expert over the dialogues of a rollout, with --gopo.expert_steps")
    credit: str = flag(
        "trajectory",
        "responder's reward: the whole return at the last token, or what each turn earned at the end of its reply",
        choices=("trajectory", "turn"),
    )
    reply_group: int = flag(
        1,
        "replies drawn at every turn of a training dialogue: one is said, the others' scores (the gre, realised, "
        "grounded and no_repetition of --gopo.responder_reward) are the baseline of its own; 2 to 16, or 1: off",
    )
    schedule: str = flag(
        "joint",
        "who learns: both at every step, in turns of --gopo.schedule_steps (the expert first), or one role alone",
        choices=("joint", "alternate", EXPERT, RESPONDER),
    )
    schedule_steps: int = flag(1, "steps of one role's turn with --gopo.schedule alternate")
    version_switch: str = flag(
        "turn",
        "with --train.partial_rollout_enable: when dialogues under way get new weights, of both roles at once: between "
        "two turns, or never within a dialogue",
        choices=("turn", "dialogue"),
    )
    common_random_numbers: bool = flag(False, "give every trajectory of a group the same user noise")
    user_timeout: float = flag(60.0, "seconds one call of the environment may take before the dialogue fails")
    attempts: int = flag(2, "times a failing dialogue is run before it is quarantined")
    max_failure_rate: float = flag(0.2, "share of quarantined dialogues in one batch that stops the run")
    engine_restarts: int = flag(
        3,
        "times a rollout actor that dies, or whose vLLM engine does, is started again with the weights of now; its "
        "dialogues are played again. Beyond that, and with --train.async_enable or --vllm.sync_with_ray, the run ends; "
        "--ckpt.load_enable goes on",
    )
    eval_goals: int = flag(200, "held-out goals of one evaluation (in train_gopo --eval.steps says when)")
    expert_num_engines: int = flag(None, "vLLM engines of the expert; default: --vllm.num_engines", kind=int)
    expert_gpu_memory_utilization: float = flag(
        None, "vLLM memory share of an expert engine; default: --vllm.gpu_memory_utilization", kind=float
    )
    worker_logs: bool = flag(False, "print what Ray workers print; without it their logs stay in Ray's session folder")
    results_dir: str = flag(None, "folder of tables, curves, transcripts; default: OUTPUT_DIR/results", kind=str)
    gpu_memory_gb: float = flag(
        None,
        "memory of one GPU in GiB: --gopo.dry_run then says whether the run fits, and what engines take",
        kind=float,
    )
    dry_run: bool = flag(False, "check data, template, labels, token budgets and batch arithmetic, then stop")
    pref: PreferenceConfig = field(default_factory=PreferenceConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        _check_values(self, "gopo")
        _require(
            bool(self.env),
            "--gopo.env",
            self.env,
            "name an environment: shop, star, abcd, multiwoz, or path/to/file.py:ClassName",
        )
        counts = ("max_turns", "reply_max_tokens", "attempts", "eval_goals", "expert_num_engines", "schedule_steps")
        for name in (*counts, "expert_plan_tokens", "expert_steps", "expert_passes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--gopo.{name}", value, "give 1 or more")
        size = self.reply_group
        _require(1 <= size <= 16, "--gopo.reply_group", size, "give 2 to 16, or 1 to turn it off")
        _require(self.engine_restarts >= 0, "--gopo.engine_restarts", self.engine_restarts, "give 0 or more")
        self.expert_terms  # noqa: B018 - a bad value is an error now
        _require(
            self.expert_steps is not None or self.expert_passes == 1,
            "--gopo.expert_passes",
            self.expert_passes,
            "give --gopo.expert_steps too: how many optimizer steps the passes are cut into",
        )
        share = self.expert_gpu_memory_utilization
        _require(
            share is None or 0 < share <= 1,
            "--gopo.expert_gpu_memory_utilization",
            share,
            "give a share of the GPU's memory, in (0, 1]",
        )
        memory = self.gpu_memory_gb
        _require(memory is None or memory > 0, "--gopo.gpu_memory_gb", memory, "give a positive number of GiB")
        _require(self.user_timeout > 0, "--gopo.user_timeout", self.user_timeout, "give a positive number of seconds")
        _require(
            "llm:" not in (self.user or "") or self.llm.timeout < self.user_timeout,
            "--gopo.llm.timeout",
            self.llm.timeout,
            f"give less than --gopo.user_timeout {self.user_timeout}",
        )
        timeout = self.reward_timeout
        _require(timeout > 0, "--gopo.reward_timeout", timeout, "give a positive number of seconds")
        _require(
            "judge:" not in (self.reward or "") or self.judge.timeout < timeout,
            "--gopo.judge.timeout",
            self.judge.timeout,
            f"give less than --gopo.reward_timeout {timeout}",
        )
        _require(
            0 <= self.max_failure_rate <= 1, "--gopo.max_failure_rate", self.max_failure_rate, "give a share in [0, 1]"
        )

        if self.policy == "single_level":
            self._check_single_level()

    def _check_single_level(self) -> None:
        """Refuse what belongs to an expert that is not there."""
        names = [name for name in (f.name for f in flags(GopoConfig)) if name.startswith("expert_")]
        for config, prefix, chosen in (
            (self, "gopo", ["sharing", "schedule", "schedule_steps", *names]),
            (self.pref, "gopo.pref", [f.name for f in flags(PreferenceConfig)]),
        ):
            for f in flags(type(config)):
                value = getattr(config, f.name)
                _require(
                    f.name not in chosen or value == default(f),
                    f"--{prefix}.{f.name}",
                    value,
                    "--gopo.policy single_level has no expert; drop it",
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the policy: one model each, or one for both with ``sharing`` shared."""
        return (EXPERT, RESPONDER) if self.policy == "two_level" else (RESPONDER,)

    @cached_property
    def expert_terms(self) -> dict[str, float]:
        """The weight of each credit term of ``--gopo.expert_credit``; terms of weight 0 are left out.

        Raises:
            ConfigError: an unknown or repeated term, a weight that is no finite number of 0 or more, or no term left.
        """
        terms: dict[str, float] = {}
        for item in self.expert_credit.split(","):
            name, _, text = (part.strip() for part in item.partition("="))
            try:
                weight = float(text)
            except ValueError:
                weight = math.nan
            _require(
                name in CREDIT_TERMS and name not in terms and math.isfinite(weight) and weight >= 0,
                "--gopo.expert_credit",
                self.expert_credit,
                f"give term=weight,..., each term once, of {', '.join(CREDIT_TERMS)}; a weight is 0 or more",
            )
            terms[name] = weight
        terms = {name: weight for name, weight in terms.items() if weight}
        _require(bool(terms), "--gopo.expert_credit", self.expert_credit, "no term is left to learn from")
        return terms

    @property
    def own_expert(self) -> bool:
        """True when the expert is a model of its own."""
        return self.policy == "two_level" and self.sharing == "separate"

    @property
    def expert_has_critic(self) -> bool:
        """True when a credit term of the expert needs a critic of its own."""
        return "critic" in self.expert_terms

    def learners(self, step: int) -> tuple[str, ...]:
        """The roles that learn at ``step`` (0, 1, ...)."""
        if self.schedule == "joint":
            return self.roles
        if self.schedule == "alternate":
            return ((EXPERT, RESPONDER)[step // self.schedule_steps % 2],)
        return (self.schedule,)


def from_flags(values: Mapping[str, Any]) -> GopoConfig:
    """Build the config from flat flag values keyed ``gopo.<field>``, ``gopo.pref.<field>`` and so on.

    Raises:
        ConfigError: a value is out of range.
    """
    nested: dict[str, Any] = {
        name: cls(**{f.name: values[f"gopo.{name}.{f.name}"] for f in flags(cls)})
        for name, cls in (("pref", PreferenceConfig), ("llm", LlmConfig), ("judge", JudgeConfig))
    }
    return GopoConfig(**{f.name: values[f"gopo.{f.name}"] for f in flags(GopoConfig)}, **nested)
