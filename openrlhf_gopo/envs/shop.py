"""``shop``: the service desk of a small web shop. Ten tasks at three desks, 26 strategies, 3-5 subgoals per goal.

Who knows what. The agent sees the desk and whether the customer is new (``Goal.context``), what was said, and, in the
briefing, what its systems say. The customer knows the task, the facts to tell and their own mood; patience, trust and
price sensitivity show only in their words. The SOP looks at the strategies used and the facts known, never at the task.

What a turn does (`users/agenda.py` has the numbers):

- A step of the task whose needs are met makes its mark; a mark with a weight is a subgoal. Other strategies cost
  patience, and wrong actions, repeated questions and early sales talk also cost trust.
- A reply must say what was done: without the expected strings, or a word on what is asked for, the customer is
  confused and the turn achieves nothing.
- With patience gone the customer leaves. With all else done, ``close`` completes the goal; before that it cuts it off.

Delayed effects:

- Refunds, replacements, address changes and payment checks stay on hold until the identity is verified: verifying early
  is cheap, verifying after a hold is not.
- A coupon offered before there is something to buy costs trust and makes every later price look high. Who is price
  sensitive objects to the price unless a coupon came first.
- Customers with low trust keep facts back and do not buy. Upset ones lose patience faster until someone apologises.
- Who wants one colour may find it sold out. To invite them unchecked fails in the cart and costs trust; after a check
  the desk promises another colour, or a wait that makes the price look high.
- An order older than the returns policy is not refunded, whoever asks: with the order found and the terms told the
  customer knows, and a coupon is what can be done; to try the refund costs trust.

Each effect follows from what a customer would mind and acts on the mood or the marks; none looks at how choices are
made, rewarded or learnt. Most mistakes can be mended at a price; the best order of steps differs by task and customer.
Chance is drawn per turn from (goal, seed, turn), so equal seeds give equal noise at equal turns. ``relevance`` knows
the task, its open steps and what the customer wants, but neither the mood nor the stock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from openrlhf_gopo.envs.base import SPLITS, Environment
from openrlhf_gopo.envs.shop_catalogue import PROCEDURE, STRATEGIES
from openrlhf_gopo.envs.shop_dialogue import ShopDialogue
from openrlhf_gopo.envs.shop_goals import Goals
from openrlhf_gopo.envs.shop_texts import LANGUAGES, load_texts
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.sop import Procedure
from openrlhf_gopo.types import Goal, Strategy


class Shop(Environment):
    """The service desk, in one language. It generates its goals and reads no data."""

    name: ClassVar[str] = "shop"
    blocking: bool = False
    max_turns: int = 12
    own_user: ClassVar[str | None] = "agenda"
    procedure: ClassVar[Procedure | None] = PROCEDURE

    def __init__(self, language: str = "en") -> None:
        """``language``: one of LANGUAGES. Goal ids and all dynamics are the same in each."""
        self._language = language
        self._texts = load_texts(language)
        self._catalogue = tuple(self._texts.translate(strategy) for strategy in STRATEGIES)

    @classmethod
    def load(cls, data: str | None) -> Shop:
        """``data``: the language, English when None. Raises ConfigError when there are no texts in it."""
        if data is not None and data not in LANGUAGES:
            raise ConfigError(
                f"--gopo.data {data}: the environment shop generates its goals and takes only a language here: choose "
                f"one of {', '.join(LANGUAGES)}, or leave --gopo.data out"
            )
        return cls(data or "en")

    def goals(self, split: str) -> Sequence[Goal]:
        if split not in SPLITS:
            raise ConfigError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
        return Goals(split, self._language)

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """All strategies of all desks; the SOP masks those of other desks."""
        return self._catalogue

    def catalogue_size(self) -> int:
        return len(self._catalogue)

    def start(self, goal: Goal, seed: int) -> ShopDialogue:
        return ShopDialogue(goal, seed, self._texts, self.voice(goal, seed))
