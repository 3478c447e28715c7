"""OpenRLHF's flags on CPU: defaults that work, and the ones that cannot."""

from __future__ import annotations

import argparse
from typing import Any

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.platform import dtype
from openrlhf_gopo.platform.environment import is_cpu

# Upstream's own defaults suppose eight GPUs.
FLAG_DEFAULTS: dict[str, Any] = {
    "actor.num_gpus_per_node": 1,
    "critic.num_gpus_per_node": 1,
    "ref.num_gpus_per_node": 1,
    "reward.num_gpus_per_node": 1,
    "ds.attn_implementation": "sdpa",
    "vllm.enforce_eager": True,
    "vllm.num_engines": 1,
    "vllm.sync_backend": "gloo",  # with "nccl" and --train.colocate_all upstream takes CUDA IPC
}

PARAM_DTYPE = "ds.param_dtype"

# flag -> (is it wrong?, remedy)
_IMPOSSIBLE = {
    "ds.packing_samples": (bool, "needs flash-attn and so CUDA; remove it"),
    "ds.ring_attn_size": (lambda size: size > 1, "needs flash-attn and so CUDA; use 1"),
    "ds.attn_implementation": (lambda name: "flash" in name, "needs CUDA; use sdpa or eager"),
    "ds.load_in_4bit": (bool, "bitsandbytes' 4-bit layers need CUDA; remove it"),
    "vllm.enable_sleep": (bool, "needs vLLM's sleep mode, which is CUDA's alone; remove it"),
    "vllm.sync_with_ray": (bool, "needs NCCL, for Ray's collectives; remove it"),
}


def adapt_flags(parser: argparse.ArgumentParser) -> None:
    """Give those of ``parser``'s flags that are in ``FLAG_DEFAULTS`` these defaults, and let ``--ds.param_dtype`` be
    fp32, its default where the processor is slow in bf16. Does nothing when there is a GPU."""
    if not is_cpu():
        return
    for action in parser._actions:
        if action.dest in FLAG_DEFAULTS:
            action.default = FLAG_DEFAULTS[action.dest]
        elif action.dest == PARAM_DTYPE:
            action.default = dtype.fastest()
            action.choices = [*(action.choices or ()), dtype.FP32]


def check_flags(args: Any) -> None:
    """Refuse what cannot work on CPU. ``args``: OpenRLHF's nested namespace, after its own validation.

    Raises:
        ConfigError: names the flag, its value and the remedy.
    """
    for flag, (wrong, remedy) in _IMPOSSIBLE.items():
        value = _lookup(args, flag)
        if value is not None and wrong(value):
            raise ConfigError(
                f"--{flag} {value}: on CPU this {remedy} (or, for a dry run of a command for GPUs, set "
                "OPENRLHF_GOPO_CPU=0)"
            )
    if _lookup(args, "train.colocate_all") and _lookup(args, "vllm.sync_backend") == "nccl":
        raise ConfigError("--vllm.sync_backend nccl with --train.colocate_all: takes CUDA IPC; on CPU use gloo")


def _lookup(args: Any, flag: str) -> Any:
    for part in flag.split("."):
        args = getattr(args, part, None)
    return args
