"""Run by test_memory.py: how much one trainer's process grows, from before its model to after its first update.

usage: memory_script.py FOLDER ZERO_STAGE LORA_RANK; the last line is the growth in bytes.
"""

from __future__ import annotations

import ctypes
import gc
import sys

from openrlhf_gopo import platform

platform.activate()

import psutil  # noqa: E402
import torch  # noqa: E402
from openrlhf.utils import get_strategy  # noqa: E402

from openrlhf_gopo.cli import train_gopo  # noqa: E402
from openrlhf_gopo.config import EXPERT  # noqa: E402
from openrlhf_gopo.runtime.actors import RolePolicyActor  # noqa: E402
from openrlhf_gopo.runtime.roles import role_args  # noqa: E402


def resident() -> int:
    """Bytes of this process in memory, freed ones given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def main(folder: str, stage: str, rank: str) -> None:
    flags = ["--gopo.env", "shop", "--actor.model_name_or_path", folder, "--algo.advantage.estimator", "group_norm"]
    flags += ["--ds.zero_stage", stage, "--ds.lora.rank", rank, "--train.batch_size", "1"]
    flags += ["--rollout.n_samples_per_prompt", "2", "--train.micro_batch_size", "1", "--ds.param_dtype", "bf16"]
    args, config = train_gopo.parse(flags)
    strategy = get_strategy(role_args(args, EXPERT, config))
    torch.ones(4, 4).bfloat16().matmul(torch.ones(4, 4).bfloat16())  # the libraries' own first buffers
    before = resident()
    expert = RolePolicyActor.__ray_metadata__.modified_class(1, 0, "127.0.0.1", sys.argv[4])
    expert.init_model_from_pretrained(strategy, folder, max_steps=10, vllm_engines=None)
    actor = expert.actor
    sequences = torch.arange(16)[None]
    logprobs = actor(sequences, torch.ones(1, 15, dtype=torch.long), torch.ones_like(sequences))
    strategy.backward(logprobs.mean(), actor, None)
    strategy.optimizer_step(None, actor, None)
    del logprobs
    print(resident() - before)


if __name__ == "__main__":
    main(*sys.argv[1:4])
