"""Runs dialogues inside upstream's rollout actors, next to the responder's vLLM engine.

``RolloutRayActor`` loads this file by path and builds ``AgentExecutor()`` without arguments (OpenRLHF 0.11.2,
vllm_engine.py:17), so everything a dialogue needs arrives with its request, in upstream's ``label``. The loader leaves
``sys.modules`` alone: classes that are pickled or are dataclasses live in other modules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.rewards.custom import load_rewards
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.engine import Generate, Generation, Sampling
from openrlhf_gopo.rollout.gate import Gate
from openrlhf_gopo.rollout.sampled import SampledPolicy
from openrlhf_gopo.runtime.requests import DialogueRequest, Switch, build_policy
from openrlhf_gopo.types import StopReason, Trajectory


class AgentExecutor(AgentExecutorBase):
    """Plays dialogues; upstream's rollout actor calls ``execute`` once per sample, all of them at once."""

    def __init__(self) -> None:
        self._alone, self._gate = asyncio.Lock(), Gate()

    async def execute(
        self,
        prompt: str,
        label: DialogueRequest | Switch,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> Trajectory | None:
        """One dialogue. A failed one is run again with the same seed, ``attempts`` times in all.

        A ``Switch`` is no dialogue: closing the gate returns when no turn, or no dialogue, is inside any more.
        """
        if isinstance(label, Switch):
            if label.version is None:
                await self._gate.close()
            else:
                self._gate.open(label.version)
            return None
        self._gate.version = max(self._gate.version, label.version)
        sample = label.claim()
        async with self._alone if label.deterministic else nullcontext():
            if label.per_turn:
                return await self._play(label, sample, llm_engine, self._gate)
            async with self._gate:
                return await self._play(label, sample, llm_engine, Gate(self._gate.version))

    async def _play(self, label: DialogueRequest, sample: int, engine: Any, gate: Gate) -> Trajectory:
        env, prompting = build_policy(label.spec)
        rewards = load_rewards(label.rewards)
        for attempt in range(label.attempts):
            responder = _local(engine, label.sampling_seeds(sample, RESPONDER))
            seeds = label.sampling_seeds(sample, EXPERT)
            own = label.expert_engine is not None
            expert = remote(label.expert_engine, seeds) if own else _local(engine, seeds)
            policy = SampledPolicy(prompting, {EXPERT: expert, RESPONDER: responder}, label.limits)
            trajectory = await run_dialogue(
                env,
                label.goal,
                policy,
                label.limits,
                sample=sample,
                seed=label.dialogue_seed(sample),
                rewards=rewards,
                gate=gate,
            )
            if trajectory.stop is not StopReason.FAILED or attempt == label.attempts - 1:
                break
        return trajectory


def sampling_params(sampling: Sampling, seed: int | None = None) -> SamplingParams:
    """vLLM's form. No ``min_tokens``: it would mask the stop token and bend the distribution that is trained on."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        stop_token_ids=None if sampling.stop_token is None else [sampling.stop_token],
        allowed_token_ids=None if sampling.allowed is None else list(sampling.allowed),
        # The sampled token's own, under the distribution it was drawn from (processed_logprobs), or all allowed ones.
        logprobs=None if sampling.probabilities else 0,
        logprob_token_ids=list(sampling.allowed) if sampling.probabilities and sampling.allowed else None,
        detokenize=False,
        n=sampling.n,
        # As it goes vLLM yields one of the n at a time; at the end all of them.
        output_kind=RequestOutputKind.FINAL_ONLY if sampling.n > 1 else RequestOutputKind.CUMULATIVE,
    )


def _generation(completion: Any, sampling: Sampling) -> Generation:
    tokens = list(completion.token_ids)
    logprobs = [float(lp[t].logprob) for t, lp in zip(tokens, completion.logprobs, strict=True)]
    asked = sampling.allowed if sampling.probabilities and sampling.allowed else ()
    return Generation(tokens, logprobs, [float(completion.logprobs[0][t].logprob) for t in asked])


def _local(engine: Any, seeds: Iterator[int | None]) -> Generate:
    return _generate(lambda tokens, params: engine.generate(tokens, params), seeds)


def remote(engine: Any, seeds: Iterator[int | None] | None = None) -> Generate:
    """``engine`` is a rollout actor in another process. ``seeds``: one per call; None: the engine's own generator."""
    return _generate(lambda tokens, params: engine.generate.remote(tokens, params), seeds or repeat(None))


def _generate(ask: Callable[[list[int], SamplingParams], Awaitable[Any]], seeds: Iterator[int | None]) -> Generate:
    async def generate(tokens: list[int], sampling: Sampling) -> list[Generation]:
        seed = next(seeds)
        if seed is None or sampling.n == 1:
            output = await ask(list(tokens), sampling_params(sampling, seed))
            return [_generation(completion, sampling) for completion in output.outputs]
        # vLLM takes in the n one by one: which of them its first steps compute together would be chance.
        one = replace(sampling, n=1)
        outputs = [await ask(list(tokens), sampling_params(one, seed + i)) for i in range(sampling.n)]
        return [_generation(output.outputs[0], one) for output in outputs]

    return generate
