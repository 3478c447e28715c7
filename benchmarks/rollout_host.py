"""OpenRLHF's own rollout actor in this process, and the ways to give it work that ``rollout.py`` compares.

- ``ours``: the two-level rollout, as it runs in training: ``generate_responses`` with this project's agent.
- ``chains``: the requests of the last run of ``ours`` (same prompts, same numbers of tokens, same sampling), straight
  into vLLM: a dialogue's next request once its last one has ended. What the engine itself can do with this work.
- ``bag``: the same requests all at once, as if no turn had to wait for the one before. No dialogue is like that.
- ``lockstep``: the same requests with a barrier after each turn.
- ``stock``: OpenRLHF's multi-turn executor with one policy in the same environment (``stock_agent.py``).

Every reply has a length drawn beforehand, fixed or long-tailed with the same mean, and no stop token: the load must not
depend on what an untrained model happens to say.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("RAY_ADDRESS", "none")  # upstream's actor would look for Ray's; nothing here connects to it

from openrlhf_gopo import platform

if not torch.cuda.is_available():  # platform.is_cpu goes by the switch alone where RAY_ADDRESS is set
    os.environ.setdefault(platform.environment.SWITCH, "1")
platform.activate()

from openrlhf.trainer.ray.vllm_engine import RolloutRayActor, _load_agent_executor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.inputs import TokensPrompt  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.metrics.reader import get_metrics_snapshot  # noqa: E402

from openrlhf_gopo.envs import load_environment  # noqa: E402
from openrlhf_gopo.platform.dtype import fastest  # noqa: E402
from openrlhf_gopo.rollout.sampled import TokenLimits  # noqa: E402
from openrlhf_gopo.runtime import agent  # noqa: E402
from openrlhf_gopo.runtime.requests import DialogueRequest, PolicySpec  # noqa: E402
from openrlhf_gopo.runtime.restarts import DTYPES  # noqa: E402

HERE = Path(__file__).parent
MAX_LEN = 4096


@dataclass(frozen=True)
class Load:
    """``dialogues`` at once, ``k`` about each goal, of ``turns`` turns with replies of ``reply`` tokens."""

    dialogues: int = 32
    k: int = 8
    turns: int = 3
    reply: int = 24
    lengths: str = "fixed"  # or "tail"
    seed: int = 0

    @property
    def data(self) -> str:
        return f"turns={self.turns},goals={self.dialogues // self.k}"


@dataclass
class Request:
    """What was asked of the engine: the load is replayed from these."""

    tokens: list[int]
    params: SamplingParams


@dataclass
class Done:
    """Of one run: seconds, and what the engine did in them by its own counters."""

    seconds: float
    generated: float
    prompt: float
    queried: float
    hit: float


class Host(RolloutRayActor.__ray_metadata__.modified_class):
    """Upstream's actor, less Ray: replies get the load's lengths, requests are recorded by dialogue."""

    load: Load
    chains: dict[str, list[Request]]

    async def generate(self, tokens: list[int], params: SamplingParams, multi_modal_data: Any = None) -> Any:
        chain = self.chains.setdefault(asyncio.current_task().get_name(), [])  # one task plays one dialogue
        if params.max_tokens > 1:
            which = list(self.chains).index(asyncio.current_task().get_name()) if self.load.lengths == "tail" else 0
            params.max_tokens = self._length(which, len(chain))
            params.ignore_eos, params.stop_token_ids, params._all_stop_token_ids = True, [], set()
        chain.append(Request(list(tokens), params))
        return await super().generate(tokens, params, multi_modal_data=multi_modal_data)

    def _length(self, dialogue: int, call: int) -> int:
        if self.load.lengths == "fixed":
            return self.load.reply
        sigma = 1.0  # of the logarithm: the longest of 32 is about 4 times the mean
        chance = random.Random(f"{self.load.seed}:{dialogue}:{call}")
        drawn = self.load.reply * chance.lognormvariate(-(sigma**2) / 2, sigma)
        return max(2, min(round(drawn), 6 * self.load.reply))


async def start(model: str, *, prefix_caching: bool, block_size: int | None) -> Host:
    """The engine as ``create_vllm_engines`` makes it."""
    host = object.__new__(Host)
    more = {"block_size": block_size} if block_size else {}
    await host.__init__(
        num_gpus=1,
        model=model,
        enforce_eager=True,
        worker_extension_cls="openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap",
        seed=0,
        distributed_executor_backend="uni",
        max_model_len=MAX_LEN,
        enable_prefix_caching=prefix_caching,
        dtype=DTYPES[fastest()],
        trust_remote_code=True,
        gpu_memory_utilization=0.5,
        logprobs_mode="processed_logprobs",
        max_logprobs=1,
        agent_func_path=agent.__file__,
        **more,
    )
    return host


@dataclass
class Bench:
    """One engine and its ways to work; ``ours`` records what the replaying ones replay."""

    host: Host
    model: str
    recorded: dict[str, list[Request]] = field(default_factory=dict)

    async def run(self, mode: str, load: Load) -> Done:
        """One run from an empty prefix cache."""
        await self.host.llm.reset_prefix_cache()
        before, began = _counters(), time.perf_counter()
        await getattr(self, mode)(load)
        seconds = time.perf_counter() - began
        await asyncio.sleep(0.05)  # the engine's statistics arrive with its outputs
        after = _counters()
        return Done(seconds, *(after[name] - before[name] for name in COUNTERS))

    async def ours(self, load: Load) -> None:
        self.host.load, self.host.chains = load, {}
        spec = PolicySpec(f"{HERE / 'synthetic.py'}:Synthetic", load.data, self.model, self.model, None, False)
        limits = TokenLimits(max_len=MAX_LEN, reply_max_tokens=load.reply)
        goals = load_environment(spec.env, spec.data).goals("train")
        requests = [DialogueRequest(g, spec, limits, load.seed, False, 1) for g in goals]
        self.host.executor = agent.AgentExecutor()
        played = await asyncio.gather(
            *(self.host.generate_responses(r.goal.id, r, None, MAX_LEN, None, num_samples=load.k) for r in requests)
        )
        wrong = [t for group in played for t in group if len(t.turns) != load.turns]
        if wrong:
            raise SystemExit(f"{len(wrong)} dialogues are not of {load.turns} turns: {wrong[0].stop}: {wrong[0].error}")
        self.recorded = self.host.chains

    async def stock(self, load: Load) -> None:
        self.host.load, self.host.chains = load, {}
        os.environ["STOCK_DATA"] = load.data
        self.host.executor = _load_agent_executor(str(HERE / "stock_agent.py"))
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        params = SamplingParams(temperature=1.0, top_p=1.0, logprobs=1, min_tokens=1, skip_special_tokens=False)
        goals = [f"train-{i}" for i in range(load.dialogues // load.k)]
        await asyncio.gather(
            *(
                self.host.generate_responses("", f"{g}:0", params.clone(), MAX_LEN, tokenizer, num_samples=load.k)
                for g in goals
            )
        )

    async def chains(self, load: Load) -> None:
        async def one(chain: list[Request]) -> None:
            for request in chain:
                await self._push(request)

        await asyncio.gather(*map(one, self.recorded.values()))

    async def bag(self, load: Load) -> None:
        await asyncio.gather(*(self._push(r) for chain in self.recorded.values() for r in chain))

    async def lockstep(self, load: Load) -> None:
        async def turn(requests: list[Request]) -> None:
            for request in requests:  # the decision, then the reply under it
                await self._push(request)

        for t in range(load.turns):
            await asyncio.gather(*(turn(chain[2 * t : 2 * t + 2]) for chain in self.recorded.values()))

    async def check(self) -> float:
        """One output at the end is the same as an output a token: the same tokens, and log-probabilities to rounding.

        Returns the largest difference of log-probabilities.
        """
        worst = 0.0
        for chain in list(self.recorded.values())[:4]:
            found = []
            for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY):
                await self.host.llm.reset_prefix_cache()
                output = (await self._push(chain[-1], kind, temperature=0.0)).outputs[0]
                found.append(
                    (
                        list(output.token_ids),
                        [of[t].logprob for t, of in zip(output.token_ids, output.logprobs, strict=True)],
                    )
                )
            (tokens, logprobs), (same, others) = found
            worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, others, strict=True)))
            if tokens != same or worst > 1e-3:
                raise SystemExit(f"output kinds differ: {tokens} and {same}, by {worst}")
        return worst

    async def _push(
        self, request: Request, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY, **changed: Any
    ) -> Any:
        params = request.params.clone()
        params.output_kind = kind
        for name, value in changed.items():
            setattr(params, name, value)
        prompt = TokensPrompt(prompt_token_ids=request.tokens)
        async for output in self.host.llm.generate(prompt, params, f"r{next(_numbers)}"):
            last = output
        return last


_numbers = iter(range(10**12))
COUNTERS = ("generation_tokens", "prompt_tokens", "prefix_cache_queries", "prefix_cache_hits")


def _counters() -> dict[str, float]:
    found = {metric.name.removeprefix("vllm:"): metric for metric in get_metrics_snapshot()}
    return {name: float(found[name].value) for name in COUNTERS}
