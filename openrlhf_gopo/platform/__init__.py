"""CPU support: the same Ray, DeepSpeed and vLLM on a machine without a GPU.

OpenRLHF 0.11.2 says ``cuda`` in a few places. ``PATCHES`` below is the whole list of what is changed, and when: after
the named module has been imported, in this process, its Ray workers and vLLM's engine processes. With a GPU nothing
of it is active. ``OPENRLHF_GOPO_CPU=1`` or ``=0`` overrides the detection. One thing is for both: the engine of a
rollout actor ends with it (``end_spawned_with_this_process``).

Importing this package is cheap; it imports neither torch nor any part of the stack.
"""

from __future__ import annotations

import os
from types import ModuleType

from openrlhf_gopo.platform import (
    children,
    cuda,
    deepspeed,
    dtype,
    environment,
    flash_attn,
    forks,
    imports,
    media,
    mkl,
    weights,
)
from openrlhf_gopo.platform.children import end_spawned_with_this_process
from openrlhf_gopo.platform.environment import SWITCH, is_cpu, one_process
from openrlhf_gopo.platform.flags import FLAG_DEFAULTS, adapt_flags, check_flags

__all__ = [
    "FLAG_DEFAULTS",
    "activate",
    "activate_in_engine",
    "adapt_flags",
    "check_flags",
    "end_spawned_with_this_process",
    "is_cpu",
    "one_process",
    "ray_runtime_env",
]


def _adapt_torch(torch: ModuleType) -> None:
    cuda.stand_in(torch)
    mkl.settle(torch)


PATCHES = {
    "multiprocessing.spawn": children.activate_spawned,
    "torch": _adapt_torch,
    "deepspeed.ops": deepspeed.skip_shared_memory_op,
    "openrlhf.utils.deepspeed.deepspeed": deepspeed.adapt_strategy,
    "openrlhf.utils.utils": dtype.accept_fp32,
    "openrlhf.utils.distributed_util": weights.send_over_gloo,
    "openrlhf.trainer.ray.vllm_worker_wrap": weights.reload_on_last_tensor,
    "vllm.model_executor.models.registry": children.inspect_models_in_process,
}
CONTEXTS = {"openrlhf.models.ring_attn_utils": flash_attn.stand_ins}

_active = False


def activate() -> None:
    """Make this process run the stack on CPU. Idempotent; does nothing when there is a GPU.

    Call it before openrlhf, deepspeed or vllm is imported: their environment variables are read at import.
    """
    global _active
    if _active or not is_cpu():
        return
    _active = True
    environment.apply()
    media.hide_what_cuda_builds_break()
    imports.install(PATCHES, CONTEXTS)


def activate_in_engine() -> None:
    """Entry point ``vllm.general_plugins``: every vLLM process of this machine calls it, also those of other users'
    programs, so it obeys the switch that the parent process set."""
    if os.environ.get(SWITCH) == "1":
        activate()


def ray_runtime_env() -> dict:
    """What ``ray.init(runtime_env=...)`` needs so that every worker process activates itself; ``{}`` with a GPU."""
    if not is_cpu():
        return {}
    return {
        "env_vars": environment.current(),
        "py_executable": forks.COMMAND,
        "worker_process_setup_hook": "openrlhf_gopo.platform.activate",
    }
