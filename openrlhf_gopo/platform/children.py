"""Processes that a process starts outside Ray: vLLM's engine core and its model inspection."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

from openrlhf_gopo import platform


class ActivateOnArrival:
    """Unpickling it calls ``activate()``."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return platform.activate, ()


def activate_spawned(spawn: Any) -> None:
    """Patch of ``multiprocessing.spawn``: children activate before they import anything else.

    vLLM's plugin hook is for this, but in 0.29.0 it runs after vLLM and transformers have been imported.
    """
    get_preparation_data = spawn.get_preparation_data

    @functools.wraps(get_preparation_data)
    def with_activation(name: str) -> dict[str, Any]:
        # The first thing that a child unpickles; keys that multiprocessing does not know are ignored.
        return {**get_preparation_data(name), "openrlhf_gopo": ActivateOnArrival()}

    spawn.get_preparation_data = with_activation


def inspect_models_in_process(registry: Any) -> None:
    """Patch of ``vllm.model_executor.models.registry``.

    vLLM looks at a model's class in a subprocess of its own only to keep CUDA uninitialised; on CPU that costs seconds
    and the subprocess would not be activated.
    """
    registry._run_in_subprocess = lambda function: function()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went.

    vLLM 0.29.0's engine core waits for requests for ever once its client was killed, and keeps its memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="gopo-end-with-parent", daemon=True).start()
