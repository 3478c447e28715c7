"""A double of the engine: the only part of a dialogue that is not the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.rollout.engine import Generation


class Engine:
    """Writes ``reply`` under the label ``choose(allowed)``: the same actions whatever the customer says."""

    def __init__(
        self,
        policy: TwoLevelPolicy,
        reply: str = "sorry about that",
        choose: Callable[[tuple[int, ...]], int] = lambda allowed: allowed[0],
    ) -> None:
        self._ids = policy.responder.tokenizer.encode(reply, add_special_tokens=False)
        self._choose = choose

    def generators(self) -> dict[str, Any]:
        return {EXPERT: self._generate, RESPONDER: self._generate}

    async def _generate(self, tokens: list[int], sampling: Any) -> list[Generation]:
        if sampling.allowed:
            return [Generation([self._choose(sampling.allowed)], [-1.0])]
        return [Generation([*self._ids, sampling.stop_token], [-0.5] * (len(self._ids) + 1))] * sampling.n
