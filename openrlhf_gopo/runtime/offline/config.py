"""The ``--gopo.offline.*`` flags of ``train_gopo_offline``."""

from __future__ import annotations

from dataclasses import dataclass, field

from openrlhf_gopo.config import EXPERT, RESPONDER, PreferenceConfig, flag
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.rewards.joint import METRICS, parse_weights

RETURNS = (*METRICS, "rating")


@dataclass(frozen=True)
class OfflineConfig:
    """``--gopo.offline.*``: what is learnt from logged dialogues."""

    role: str = flag(EXPERT, "the model that learns: one role per run", choices=(EXPERT, RESPONDER))
    reward: str = flag(
        "tse=1", "return of a logged dialogue: weighted sum of its metrics and its rating, e.g. tse=1,rating=0.5"
    )
    group: str = flag(
        "intent", "dialogues that are compared: of one intent, or of one goal id", choices=("intent", "goal")
    )
    similarity: float = flag(
        0.0, "in [0, 1]: compare only goals whose subgoals and facts have this Jaccard similarity; 0: all of a group"
    )
    group_size: int = flag(8, "dialogues compared with each other in a step, drawn from the group anew in every epoch")
    support: int = flag(
        3,
        "the expert learns only on strategies that so many logged decisions of the task chose; 0: on all",
    )
    pref_coef: float = flag(
        None,
        "weight of the preference loss, between dialogues (expert) or between replies under one strategy (responder); "
        "default: 1 for the expert, 0 for the responder",
        kind=float,
    )
    sft_coef: float = flag(
        None,
        "weight of imitating the better dialogues; default: 0 for the expert, 1 for the responder",
        kind=float,
    )
    keep: float = flag(0.5, "in (0, 1]: the better dialogues are this share of each group, by return")
    pref: PreferenceConfig = field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        parse_weights(self.reward, RETURNS)
        for name, ok, remedy in (
            ("similarity", 0 <= self.similarity <= 1, "give a number in [0, 1]"),
            ("group_size", self.group_size >= 2, "a preference compares two dialogues; give 2 or more"),
            ("support", self.support >= 0, "give 0 or more"),
            ("pref_coef", self.preference >= 0, "give 0 or more"),
            ("sft_coef", self.imitation >= 0, "give 0 or more"),
            ("keep", 0 < self.keep <= 1, "give a share in (0, 1]"),
        ):
            if not ok:
                raise ConfigError(f"--gopo.offline.{name} {getattr(self, name)}: {remedy}")
        if self.preference == 0 == self.imitation:
            raise ConfigError(
                "--gopo.offline.pref_coef 0: there is nothing to learn; raise it or --gopo.offline.sft_coef"
            )

    @property
    def preference(self) -> float:
        """``pref_coef``, or the role's default."""
        return float(self.role == EXPERT) if self.pref_coef is None else self.pref_coef

    @property
    def imitation(self) -> float:
        """``sft_coef``, or the role's default."""
        return float(self.role == RESPONDER) if self.sft_coef is None else self.sft_coef
