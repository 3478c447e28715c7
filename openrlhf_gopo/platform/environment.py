"""Is there a GPU, and which environment variables does the stack want without one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import sys

from openrlhf_gopo.errors import ConfigError

SWITCH = "OPENRLHF_GOPO_CPU"


def is_cpu() -> bool:
    """True when this run is on CPU: the switch says so, or there is no switch and torch sees no CUDA device.

    A driver that joins a cluster (``RAY_ADDRESS``) often runs on a head node without GPU while the workers have some,
    so there only the switch counts.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ConfigError(f"{SWITCH}={switch}: use 1 (run on CPU) or 0 (never), or unset it (CPU if no GPU is found)")
    if switch:
        return switch == "1"
    return not os.environ.get("RAY_ADDRESS") and not _sees_cuda()


def _sees_cuda() -> bool:
    if "torch" not in sys.modules:
        if importlib.util.find_spec("torch") is None:
            return False
        if importlib.metadata.version("torch").endswith("+cpu"):  # no need to import it (2 s) to know
            return False
    import torch

    return torch.cuda.is_available()


def defaults() -> dict[str, str]:
    """The variables and their values; what the user has set already wins over them."""
    return {
        SWITCH: "1",
        "DS_ACCELERATOR": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; otherwise the flag gpu_memory_utilization takes 95% of the memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines share the cores with the trainers
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keeps executor "uni": one process less per engine
        "TORCH_COMPILE_DISABLE": "1",  # vLLM's sampler compiles a comparison, eager or not: 8 s of the first rollout
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # All processes share the cores and mostly take turns: give each all of them, but let idle threads sleep.
        "OMP_NUM_THREADS": str(_usable_cores()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        # bf16 kernels, compiled for a batch's shape, that oneDNN and PyTorch keep: 1,024 each by default. Lengths vary,
        # so a process would grow by gigabytes; the last few shapes are enough.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",
    }


def apply() -> None:
    """Set what is not set."""
    for name, value in defaults().items():
        os.environ.setdefault(name, value)
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "openrlhf_gopo_cpu" not in plugins.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, "openrlhf_gopo_cpu"]))


def current() -> dict[str, str]:
    """The variables as they are or would be in this process: what its workers should get."""
    return {name: os.environ.get(name, value) for name, value in defaults().items()} | {SWITCH: "1"}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_process() -> None:
    """What a launcher would set for a job of one process, unless one did: or DeepSpeed goes looking for MPI."""
    if "RANK" in os.environ:  # under torchrun or deepspeed
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in single.items():
        os.environ.setdefault(name, value)
