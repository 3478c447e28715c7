"""``shop``: the service desk of a small web shop. Ten tasks at three desks, 26 strategies, 3-5 subgoals per goal.

Who knows what. The agent sees the desk and whether the customer is new (``Goal.context``), what was said, and, in the
briefing, what its systems say. The customer knows the task, the facts to tell and their own mood; patience, trust and
price sensitivity show only in their words. The SOP looks at the strategies used and the facts known, never at the task.

What a turn does (`users/agenda.py` has the numbers):

- A step of the task whose needs are met makes its mark; a mark with a weight is a subgoal. Other strategies cost
  patience, and wrong actions, repeated questions and early sales talk also cost trust.
- A reply must say what was done: without the expected strings, or a word on what is asked for, the customer is
  confused and the turn achieves nothing.
- Delayed effects. Refunds, replacements, address changes and payment checks stay on hold until the identity is
  verified: verifying early is cheap, verifying after a hold is not. A coupon offered before there is something to buy
  costs trust and makes every later price look high. Customers with low trust keep facts back and do not buy. Upset
  customers lose patience faster until someone apologises. Who is price sensitive objects to the price unless a coupon
  came first.
- With patience gone the customer leaves. With all else done, ``close`` completes the goal; before that it cuts it off.

``relevance`` knows the task and its open steps, but not the mood: who keeps facts back, who finds the price too high.
Chance is drawn per turn from (goal, seed, turn), so equal seeds give equal noise at equal turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from openrlhf_gopo.envs.base import SPLITS, Environment
from openrlhf_gopo.envs.shop_catalogue import STRATEGIES
from openrlhf_gopo.envs.shop_dialogue import ShopDialogue
from openrlhf_gopo.envs.shop_goals import all_goals
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.types import Goal, Strategy


class Shop(Environment):
    """The service desk. It generates its goals and reads no data."""

    name: ClassVar[str] = "shop"
    blocking: bool = False
    max_turns: int = 12
    own_user: ClassVar[str | None] = "agenda"

    @classmethod
    def load(cls, data: str | None) -> Shop:
        """Raises ConfigError when data is given: there is nothing to read."""
        if data:
            raise ConfigError(f"--gopo.data {data}: the environment shop generates its goals; leave --gopo.data out")
        return cls()

    def goals(self, split: str) -> Sequence[Goal]:
        if split not in SPLITS:
            raise ConfigError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
        return all_goals()[split]

    def catalogue(self, goal: Goal) -> Sequence[Strategy]:
        """All strategies of all desks; the SOP masks those of other desks."""
        return STRATEGIES

    def start(self, goal: Goal, seed: int) -> ShopDialogue:
        return ShopDialogue(goal, seed, self.max_turns, self.voice(goal, seed))
