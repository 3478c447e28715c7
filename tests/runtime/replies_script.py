"""Run by test_engine_replies.py: OpenRLHF's rollout actor in this process draws several replies to one prompt.

usage: replies_script.py MODEL; the last line is JSON: what was drawn, as lists of token ids and log-probabilities.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from itertools import repeat
from typing import Any

os.environ.setdefault("RAY_ADDRESS", "none")  # upstream's actor would look for Ray's; nothing here connects to it
os.environ["OPENRLHF_GOPO_CPU"] = "1"

from openrlhf_gopo import platform

platform.activate()

from openrlhf.trainer.ray.vllm_engine import RolloutRayActor  # noqa: E402

from openrlhf_gopo.rollout.engine import Sampling  # noqa: E402
from openrlhf_gopo.runtime import agent  # noqa: E402

PROMPT = [1, 20, 30, 40, 2, 1]


async def main(model: str) -> dict[str, Any]:
    actor = RolloutRayActor.__ray_metadata__.modified_class
    host = object.__new__(actor)
    await host.__init__(
        num_gpus=1,
        model=model,
        enforce_eager=True,
        worker_extension_cls="openrlhf_gopo.runtime.engine_worker.EngineWorker",
        seed=0,
        distributed_executor_backend="uni",
        max_model_len=128,
        enable_prefix_caching=True,
        dtype="float32",
        trust_remote_code=True,
        gpu_memory_utilization=0.1,
        logprobs_mode="processed_logprobs",
        max_logprobs=1,
        agent_func_path=agent.__file__,
    )

    async def drawn(seed: int | None, n: int, tokens: int = 12) -> list[Any]:
        generate = agent._local(host, repeat(seed))
        found = await generate(PROMPT, Sampling(tokens, stop_token=2, n=n))
        return [[one.tokens, one.logprobs] for one in found]

    together = await asyncio.gather(*(drawn(None, 5) for _ in range(4)))
    return {
        "together": together,
        "seeded": [await drawn(7, 3), await drawn(7, 3)],
        "alone": [(await drawn(seed, 1))[0] for seed in (7, 8, 9)],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
