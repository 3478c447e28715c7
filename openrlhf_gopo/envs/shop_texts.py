"""What the shop's customers and desks say, by language: ``shop_en.yaml``, ``shop_zh.yaml``.

The rules of the game are the same in every language: goals are drawn as English words, then put into ``words``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import yaml

from openrlhf_gopo.types import Strategy

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Script:
    """One strategy's texts, with ``{slots}``. ``topic``: words of which a reply that asks must contain one."""

    briefing: str
    replies: tuple[str, ...]
    expected: tuple[str, ...] = ()
    topic: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """All texts of one language.

    ``context``, ``money`` and ``address`` are patterns, ``comma`` joins what a customer says. ``words`` translates the
    goals' values and ``strategies`` the catalogue (id -> name, description); what is not in them stays English.
    ``phrases`` (by act) and ``flavour`` (by persona) are the customer's, ``scripts`` (by strategy) the desk's.
    """

    context: str
    money: str
    address: str
    comma: str
    words: Mapping[str, str]
    strategies: Mapping[str, tuple[str, str]]
    phrases: Mapping[str, tuple[str, ...]]
    flavour: Mapping[str, tuple[str, ...]]
    scripts: Mapping[str, Script]

    def word(self, english: str) -> str:
        """The word of this language."""
        return self.words.get(english, english)

    def translate(self, strategy: Strategy) -> Strategy:
        """The strategy with its name and description in this language."""
        name, description = self.strategies.get(strategy.id, (strategy.name, strategy.description))
        return replace(strategy, name=name, description=description)


@lru_cache(maxsize=len(LANGUAGES))
def load_texts(language: str) -> Texts:
    """The texts of one of LANGUAGES."""
    # The C parser takes 2 ms, the one in Python 20: every rollout process reads this.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    file = Path(__file__).with_name(f"shop_{language}.yaml")
    raw = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    scripts = {
        name: Script(script.pop("briefing"), **{key: tuple(texts) for key, texts in script.items()})
        for name, script in raw.pop("scripts").items()
    }
    phrases, flavour = ({key: tuple(texts) for key, texts in raw.pop(name).items()} for name in ("phrases", "flavour"))
    return Texts(**raw, phrases=phrases, flavour=flavour, scripts=scripts)
