"""DeepSpeed without CUDA: no C++ builds at start, and the CPU wherever ``DeepspeedStrategy`` says cuda."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any


def skip_shared_memory_op(ops: ModuleType) -> None:
    """DeepSpeed 0.19.6 compiles a shared-memory all-reduce when it starts on CPU; Gloo is there and enough."""
    vars(ops)["__compatible_ops__"]["deepspeed_shm_comm"] = False


def adapt_strategy(module: Any) -> None:
    """``setup_distributed`` asks for a "cuda" mesh, ``ppo_actor`` passes "cuda" to ``moving_average`` (0.11.2)."""
    strategy = module.DeepspeedStrategy
    module.init_device_mesh = _on_cpu_mesh(module.init_device_mesh)
    strategy.get_ds_train_config = _with_torch_adam(strategy.get_ds_train_config)
    strategy.get_ds_train_config = _gathering_in_order(strategy.get_ds_train_config)
    strategy.get_ds_eval_config = _gathering_in_order(strategy.get_ds_eval_config)
    strategy.moving_average = _averaging_on_cpu(strategy.moving_average)


def _on_cpu_mesh(init_device_mesh: Any) -> Any:
    @functools.wraps(init_device_mesh)
    def init(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return init_device_mesh("cpu", *args, **kwargs)

    return init


def _with_torch_adam(get_ds_train_config: Any) -> Any:
    """DeepSpeed's FusedAdam and CPUAdam are compiled at first use; torch's own AdamW is the same update."""

    @functools.wraps(get_ds_train_config)
    def get(self: Any, optim_dict: dict | None = None, **kwargs: Any) -> dict:
        if optim_dict is not None and optim_dict.get("type") == "AdamW":
            optim_dict = {**optim_dict, "params": {**optim_dict["params"], "torch_adam": True}}
        return get_ds_train_config(self, optim_dict, **kwargs)

    return get


def _gathering_in_order(get_ds_config: Any) -> Any:
    """ZeRO-3 waits for the last of several all-gathers only (partition_parameters.py:2082), and Gloo's may end in any
    order: parameters gathered together could be read before they are there."""

    @functools.wraps(get_ds_config)
    def get(self: Any, *args: Any, **kwargs: Any) -> dict:
        config = get_ds_config(self, *args, **kwargs)
        config["zero_optimization"]["stage3_allgather_sequential"] = True
        return config

    return get


def _averaging_on_cpu(moving_average: Any) -> Any:
    @functools.wraps(moving_average)
    def average(self: Any, model: Any, model_ema: Any, beta: float = 0.992, device: str = "cpu") -> None:
        return moving_average(self, model, model_ema, beta, "cpu")

    return average
