"""Runs dialogues inside upstream's rollout actors, next to the responder's vLLM engine.

``RolloutRayActor`` loads this file by path and builds ``AgentExecutor()`` without arguments (OpenRLHF 0.11.2,
vllm_engine.py:17), so everything a dialogue needs arrives with its request, in upstream's ``label``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase
from vllm import SamplingParams

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.rollout.dialogue import Limits, run_dialogue
from openrlhf_gopo.rollout.engine import Generate, Generation, Sampling
from openrlhf_gopo.types import Goal, StopReason, Trajectory


@dataclass(frozen=True)
class PolicySpec:
    """What identifies environment and policy in every process: names and paths, cheap to send and to hash."""

    env: str
    data: str | None
    expert_path: str
    responder_path: str
    labels: str | None
    use_fast: bool = True


@dataclass
class DialogueRequest:
    """One group: K dialogues about ``goal``. ``expert_engine`` is None when one engine serves both roles."""

    goal: Goal
    spec: PolicySpec
    limits: Limits
    seed: int
    common_random_numbers: bool
    attempts: int
    expert_engine: Any = None
    _claimed: int = field(default=0, repr=False)

    def claim(self) -> int:
        """The next sample index: upstream starts K executions with one and the same request."""
        self._claimed += 1
        return self._claimed - 1

    def dialogue_seed(self, sample: int) -> int:
        """Seed of the user simulator: of (run, goal, sample), or of (run, goal) with common random numbers."""
        key = f"{self.seed}:{self.goal.id}:{0 if self.common_random_numbers else sample}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


@lru_cache(maxsize=2)
def build_policy(spec: PolicySpec) -> tuple[Environment, TwoLevelPolicy]:
    """Load environment, tokenizers and templates once per process.

    Raises:
        ConfigError, DataError, StreamError: the spec names something unusable.
    """
    from openrlhf.utils import get_tokenizer

    env = load_environment(spec.env, spec.data)
    responder = get_tokenizer(spec.responder_path, None, "left", None, spec.use_fast)
    shared = spec.expert_path == spec.responder_path
    expert = responder if shared else get_tokenizer(spec.expert_path, None, "left", None, spec.use_fast)
    catalogues = {
        id(c): c for c in (env.catalogue(goal) for split in ("train", "heldout") for goal in env.goals(split))
    }
    size = max(len(c) for c in catalogues.values())
    return env, TwoLevelPolicy(expert, responder, size, spec.labels)


class AgentExecutor(AgentExecutorBase):
    """Plays dialogues; upstream's rollout actor calls ``execute`` once per sample, all of them at once."""

    async def execute(
        self,
        prompt: str,
        label: DialogueRequest,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> Trajectory:
        """One dialogue. A failed one is run again with the same seed, ``attempts`` times in all."""
        env, policy = build_policy(label.spec)
        responder = _local(llm_engine)
        expert = responder if label.expert_engine is None else _remote(label.expert_engine)
        sample = label.claim()
        for attempt in range(label.attempts):
            trajectory = await run_dialogue(
                env,
                label.goal,
                policy,
                {EXPERT: expert, RESPONDER: responder},
                label.limits,
                sample=sample,
                seed=label.dialogue_seed(sample),
            )
            if trajectory.stop is not StopReason.FAILED or attempt == label.attempts - 1:
                break
        return trajectory


def sampling_params(sampling: Sampling) -> SamplingParams:
    """vLLM's form. No ``min_tokens``: it would mask the stop token and bend the distribution that is trained on."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_token_ids=None if sampling.stop_token is None else [sampling.stop_token],
        allowed_token_ids=None if sampling.allowed is None else list(sampling.allowed),
        logprobs=0,  # the sampled token's own, under the distribution it was drawn from (processed_logprobs)
        detokenize=False,
    )


def _generation(output: Any) -> Generation:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return Generation(tokens, [float(lp[t].logprob) for t, lp in zip(tokens, completion.logprobs, strict=True)])


def _local(engine: Any) -> Generate:
    async def generate(tokens: list[int], sampling: Sampling) -> Generation:
        return _generation(await engine.generate(list(tokens), sampling_params(sampling)))

    return generate


def _remote(engine: Any) -> Generate:
    async def generate(tokens: list[int], sampling: Sampling) -> Generation:
        return _generation(await engine.generate.remote(list(tokens), sampling_params(sampling)))

    return generate
