"""A rule-based user: a mood that wears out, and several ways to say each thing.

The environment decides what a turn achieved; this user decides how it feels and what is said. The mood is hidden:

- ``patience`` in nuisance units: every turn costs or gives some; at 0 the user leaves.
- ``trust`` in [0, 1]: below a threshold the user may keep personal facts back or not buy; it also colours engagement.
- ``price_sensitivity`` in [0, 1]: how likely a price meets an objection.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from openrlhf_gopo.rewards.text import mentions


@dataclass(frozen=True)
class Reaction:
    """What one turn does to the user: engagement in [0, 1] at trust 0.5, and changes of patience and trust."""

    event: str
    engagement: float
    patience: float
    trust: float


REACTIONS: Mapping[str, Reaction] = {
    "progress": Reaction("reply", 0.9, 0.3, 0.03),
    "find": Reaction("click", 0.95, 0.3, 0.03),
    "cart": Reaction("cart", 0.95, 0.3, 0.05),
    "buy": Reaction("purchase", 1.0, 0.5, 0.1),
    "step": Reaction("reply", 0.78, -0.1, 0.01),
    "late_step": Reaction("reply", 0.5, -0.6, -0.05),
    "care": Reaction("reply", 0.8, 1.0, 0.15),
    "bye": Reaction("thanks", 1.0, 0.0, 0.0),
    "cut_off": Reaction("leave", 0.0, -1.0, -0.3),
    "idle": Reaction("reply", 0.3, -1.0, -0.08),
    "extra_ok": Reaction("click", 0.5, -0.3, 0.0),
    "repeat": Reaction("reply", 0.15, -1.2, -0.12),
    "letdown": Reaction("reply", 0.6, -0.3, 0.0),
    "sold_out": Reaction("object", 0.2, -0.9, -0.15),
    "wrong": Reaction("object", 0.15, -1.3, -0.16),
    "refuse": Reaction("refuse", 0.35, -0.5, 0.0),
    "expensive": Reaction("object", 0.5, -0.4, 0.0),
    "unsure": Reaction("object", 0.4, -0.5, 0.0),
    "misfit": Reaction("object", 0.3, -1.0, -0.2),
    "held": Reaction("object", 0.15, -0.9, -0.25),
    "pushy": Reaction("object", 0.15, -1.0, -0.35),
    "confused": Reaction("confused", 0.1, -1.2, -0.12),
}

_WEIGHT_OF_TRUST = 0.5  # engagement moves by up to +-0.25 between no trust and full trust
_REFUSAL = (1.0, 1.4)  # P(keep a personal fact back) = 1 - 1.4 trust: never from trust 0.72 on


class AgendaUser:
    """One customer in one dialogue. All chance comes from the ``rng`` passed in, so callers own the noise.

    ``comma`` stands between two things said: a comma as the phrases' language writes it, and a space if it takes one.
    """

    def __init__(
        self,
        persona: Mapping[str, float | str],
        phrases: Mapping[str, Sequence[str]],
        flavour: Mapping[str, Sequence[str]],
        *,
        upset: bool = False,
        comma: str = ", ",
    ) -> None:
        self.patience = float(persona["patience"])
        self.trust = float(persona["trust"])
        self.price_sensitivity = float(persona["price_sensitivity"])
        self.upset = upset
        self._type = str(persona["type"])
        self._phrases = phrases
        self._flavour = flavour.get(self._type, ())
        self._comma = comma

    @property
    def gone(self) -> bool:
        """True when patience is out: the user leaves."""
        return self.patience <= 0

    def feel(self, kind: str) -> Reaction:
        """Change the mood as ``kind`` does, and return the reaction with the engagement that this mood shows.

        An upset user loses patience 1.5 times as fast, until someone cares ("care" ends it).
        """
        base = REACTIONS[kind]
        change = base.patience * 1.5 if self.upset and base.patience < 0 else base.patience
        engagement = base.engagement + _WEIGHT_OF_TRUST * (self.trust - 0.5)
        self.patience += change
        self.trust = min(1.0, max(0.0, self.trust + base.trust))
        if kind == "care":
            self.upset = False
        return Reaction(base.event, min(1.0, max(0.0, engagement)), change, base.trust)

    def keeps_back(self, rng: random.Random) -> bool:
        """Whether a personal fact is refused this time."""
        return rng.random() < _REFUSAL[0] - _REFUSAL[1] * self.trust

    def finds_it_expensive(self, rng: random.Random, *, discount: bool, spoiled: bool) -> bool:
        """Whether the price meets an objection; ``spoiled``: a discount came too early and more is expected now."""
        chance = 1.2 * self.price_sensitivity - 0.25 + (0.3 if spoiled else 0.0) - (0.75 if discount else 0.0)
        return rng.random() < chance

    def say(self, rng: random.Random, acts: Sequence[str], slots: Mapping[str, object], flavour: float = 0.1) -> str:
        """One phrase per act, joined; with probability ``flavour`` something that shows the persona."""
        parts = [rng.choice(self._phrases[act]).format_map(slots) for act in acts]
        if self._flavour and rng.random() < flavour:
            parts.append(rng.choice(self._flavour))
        text = self._comma.join(part.rstrip(self._comma) for part in parts)
        for end in "?!？！":  # no comma after these
            text = text.replace(end + self._comma[0], end)
        return text

    def values(self, acts: Sequence[str], slots: Mapping[str, object], words: str) -> list[str]:
        """The values of ``slots`` that ``words``, said for ``acts``, tell."""
        phrases = [phrase for act in acts for phrase in self._phrases[act]]
        names = dict.fromkeys(name for phrase in phrases for _, name, _, _ in Formatter().parse(phrase) if name)
        return [value for name in names if mentions(words, value := str(slots[name]))]
