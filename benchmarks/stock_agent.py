"""``synthetic.py`` for OpenRLHF's stock multi-turn executor: one policy, one stream, the agent of its documentation.

    --train.agent_func_path benchmarks/stock_agent.py

The label of a prompt names the dialogue, ``GOAL:SEED``. STOCK_DATA is the environment's data, STOCK_REPLY the cap of
one reply: upstream gives a reply all of the remaining context, which no untrained model would ever leave.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import STRATEGIES, Synthetic

from openrlhf_gopo.policy import prompts
from openrlhf_gopo.types import Observation

DATA, REPLY = os.environ.get("STOCK_DATA"), int(os.environ.get("STOCK_REPLY", "0"))
ENV = Synthetic.load(DATA)
GOALS = {goal.id: goal for goal in ENV.goals("train")}
_STARTED = count()


def opening(goal_id: str) -> str:
    """The start of a stream in ChatML: the responder's instructions."""
    return f"<|im_start|>system\n{prompts.responder_system(GOALS[goal_id].context)}<|im_end|>\n"


def asked(observation: Observation) -> str:
    """A user message as the two-level responder reads it, under the strategy of the day."""
    strategy = STRATEGIES[len(observation.user) % len(STRATEGIES)]
    text = prompts.responder_turn(observation.user, strategy, "")
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


class AgentInstance(AgentInstanceBase):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.dialogue: Any = None

    async def reset(self, states: dict, **kwargs: Any) -> dict:
        goal, seed = states["label"].split(":")
        self.dialogue = ENV.start(GOALS[goal], int(seed) + next(_STARTED))
        return {"observation": opening(goal) + asked(self.dialogue.opening)}

    async def step(self, states: dict, **kwargs: Any) -> dict[str, Any]:
        outcome = self.dialogue.step("", states["action_text"])
        reward = torch.tensor(outcome.engagement)
        end = "\n" if states["action_text"].endswith("<|im_end|>") else "<|im_end|>\n"
        return {
            "rewards": reward,
            "scores": reward,
            "environment_feedback": "" if outcome.next is None else end + asked(outcome.next),
            "done": outcome.next is None,
        }


class Capped:
    """The engine, with a cap on every reply."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def generate(self, tokens: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        sampling_params.max_tokens = min(sampling_params.max_tokens, REPLY)
        return await self.engine.generate(tokens, sampling_params, multi_modal_data=multi_modal_data)


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self) -> None:
        super().__init__(AgentInstance)

    async def execute(self, *args: Any, llm_engine: Any, **kwargs: Any) -> dict:
        return await super().execute(*args, llm_engine=Capped(llm_engine) if REPLY else llm_engine, **kwargs)
