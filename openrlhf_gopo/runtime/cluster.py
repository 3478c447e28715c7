"""Ray with upstream's environment variables, on this machine or a cluster."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from openrlhf_gopo import platform
from openrlhf_gopo.errors import WorkerError

# What upstream gives every worker, unless the user has set it.
UPSTREAM = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
LATE = "The current node timed out during startup"  # Ray's words (node.py:423 of 2.55.0), as a plain Exception

logger = logging.getLogger(__name__)


def init_ray(gpus: int, worker_logs: bool = False) -> None:
    """Connect to the running cluster or start a local one, with upstream's environment variables.

    ``gpus``: how many the groups will ask for; without a GPU the local cluster gets as many logical ones.

    Raises:
        WorkerError: a local cluster was not there within the time that Ray gives itself.
    """
    if ray.is_initialized():
        return
    env_vars = {name: os.environ.get(name, value) for name, value in UPSTREAM.items()}
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    if not platform.is_cpu():
        _init(runtime_env=runtime_env, log_to_driver=worker_logs)
        there = int(ray.cluster_resources().get("GPU", 0))
        if there < gpus:  # no error: a cluster with an autoscaler grows
            logger.warning(
                "the groups and engines ask for %d GPUs, Ray has %d: waiting for more. If none will come, stop this "
                "and give the groups fewer, or the same ones (--train.colocate_all)",
                *(gpus, there),
            )
        return
    cpu = platform.ray_runtime_env()
    cpu["env_vars"] = {**env_vars, **cpu["env_vars"]}
    _init(
        num_gpus=gpus,
        num_cpus=max(16, 2 * gpus),
        include_dashboard=False,
        runtime_env=cpu,
        log_to_driver=worker_logs,
    )


def _init(**options: Any) -> None:
    try:
        ray.init(**options)
    except Exception as error:
        if LATE not in str(error):
            raise
        raise WorkerError(
            "Ray did not start within the 30 s that it gives itself: this machine is too busy; try again when it has "
            "less to do"
        ) from error
