"""What one dialogue costs the two Python processes that a rollout may wait for: the driver and an engine's event loop.

Every figure is CPU seconds of the real functions on trajectories of the real form; ``scale.py`` simulates with them.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from openrlhf_gopo import platform

platform.activate()

import torch  # noqa: E402

from openrlhf_gopo.config import EXPERT, RESPONDER  # noqa: E402
from openrlhf_gopo.evaluation.records import append_trajectory  # noqa: E402
from openrlhf_gopo.evaluation.summary import summarise  # noqa: E402
from openrlhf_gopo.rewards import response  # noqa: E402
from openrlhf_gopo.rollout.dialogue import run_dialogue  # noqa: E402
from openrlhf_gopo.rollout.engine import Generation, Sampling  # noqa: E402
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits  # noqa: E402
from openrlhf_gopo.runtime import agent  # noqa: E402
from openrlhf_gopo.runtime.requests import DialogueRequest, PolicySpec, build_policy  # noqa: E402
from openrlhf_gopo.runtime.samples import DialogueSample, to_experience  # noqa: E402
from openrlhf_gopo.types import Trajectory  # noqa: E402

WEIGHTS = {EXPERT: {"tse": 1.0}, RESPONDER: {"tse": 0.5, "gre": 1.0}}  # the defaults of --gopo.*_reward


def cost(call: Callable[[], Any], repeats: int = 7, at_least: float = 0.05) -> float:
    """CPU seconds of one call: the median of several means."""
    calls, spent = 1, 0.0
    while True:
        spent = _cpu(call, calls)
        if spent >= at_least:
            break
        calls = max(2 * calls, int(calls * at_least / max(spent, 1e-6)))
    return median([spent / calls, *(_cpu(call, calls) / calls for _ in range(repeats - 1))])


def _cpu(call: Callable[[], Any], calls: int) -> float:
    began = time.process_time()
    for _ in itertools.repeat(None, calls):
        call()
    return time.process_time() - began


def loop_costs(model: str, turns: int, reply: int, tokens_seen: int = 200) -> tuple[dict[str, float], Trajectory]:
    """Of the engine's event loop, per dialogue: playing it against an engine that answers at once; and its parts.

    ``reply``: tokens of one reply. Returns the costs and a trajectory to measure the driver with.
    """
    data = f"turns={turns},words={tokens_seen // 10}"
    spec = PolicySpec(f"{Path(__file__).parent / 'synthetic.py'}:Synthetic", data, model, model, None, False)
    env, policy = build_policy(spec)
    limits, goal = TokenLimits(max_len=32768, reply_max_tokens=reply), env.goals("train")[0]
    chance = random.Random(0)
    words = list(range(300, 1000))

    async def at_once(tokens: list[int], sampling: Sampling) -> list[Generation]:
        count = sampling.max_tokens
        sampled = chance.choices(sampling.allowed or words, k=count)
        return [Generation(sampled, [-1.0] * count)]

    sampled = SampledPolicy(policy, {EXPERT: at_once, RESPONDER: at_once}, limits)

    def play() -> Trajectory:
        return asyncio.run(run_dialogue(env, goal, sampled, limits))

    trajectory, template = play(), policy.responder
    assert len(trajectory.turns) == turns, trajectory.error
    user = trajectory.turns[0].user
    asked = Sampling(reply, stop_token=template.stop_token)
    output, params = _output(reply), agent.sampling_params(asked)
    return {
        "dialogue": cost(play),
        "message": cost(lambda: template.next(user)),
        "decode": cost(lambda: template.decode(words[:reply])),
        "sampling_params": cost(lambda: agent.sampling_params(asked)),
        "copied_params": cost(params.clone),
        "generation": cost(lambda: agent._generation(output.outputs[0], asked)),
    }, trajectory


def _output(reply: int) -> Any:
    """A finished request as vLLM returns it."""
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    logprobs = [{t: Logprob(-1.0, 1, None)} for t in range(reply)]
    completion = CompletionOutput(0, "", list(range(reply)), -1.0, logprobs, finish_reason="length")
    return RequestOutput("r", None, [1], None, [completion], True)


def driver_costs(trajectory: Trajectory, k: int) -> dict[str, float]:
    """Of the driver, per trajectory."""
    sample = DialogueSample.of(trajectory, WEIGHTS)

    def unseen() -> DialogueSample:
        response._grams.cache_clear()  # the replies of another trajectory would not be in it
        return DialogueSample.of(trajectory, WEIGHTS)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trajectories.jsonl"
        written = cost(lambda: append_trajectory(path, trajectory))
        size = path.stat().st_size / sum(1 for _ in path.open())
    found = {
        "jsonl": written,
        "sample": cost(unseen),
        "experiences": cost(lambda: [to_experience(sample, role, 12 * (role == EXPERT)) for role in WEIGHTS]),
        "summary": cost(lambda: summarise([trajectory] * 64)) / 64,
    }
    return found | {"bytes": size} | _ray_costs(trajectory, k)


def _ray_costs(trajectory: Trajectory, k: int) -> dict[str, float]:
    """Dispatching a group and fetching its K trajectories, through the real Ray from a real actor."""
    import ray

    from openrlhf_gopo.runtime.cluster import init_ray

    init_ray(gpus=1)

    @ray.remote
    class Engine:
        async def generate_responses(self, **kwargs: Any) -> list[Trajectory]:
            return self.played

        async def have(self, played: list[Trajectory]) -> None:
            self.played = played

    engine = Engine.remote()
    # Copies: pickle writes an object that a list holds twice only once.
    ray.get(engine.have.remote([copy.deepcopy(trajectory) for _ in range(k)]))
    request = DialogueRequest(trajectory.goal, None, TokenLimits(max_len=1, reply_max_tokens=1), 0, False, 1)

    def dispatch() -> Any:
        return engine.generate_responses.remote(prompt="", label=request, sampling_params=None, num_samples=k)

    sent, got = [], []
    for _ in range(40):
        began = time.process_time()
        refs = [dispatch() for _ in range(8)]
        sent.append((time.process_time() - began) / 8)
        ray.wait(refs, num_returns=len(refs))
        began = time.process_time()
        for ref in refs:
            ray.get(ref)
        got.append((time.process_time() - began) / 8)
    ray.shutdown()
    return {"dispatch": median(sent) / k, "fetch": median(got) / k}


def measure(model: str, turns: int, reply: int, k: int) -> dict[str, dict[str, float]]:
    """CPU seconds per dialogue of the engine's loop and of the driver."""
    torch.set_num_threads(1)
    loop, trajectory = loop_costs(model, turns, reply)
    return {"loop": loop, "driver": driver_costs(trajectory, k)}
