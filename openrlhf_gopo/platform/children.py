"""Processes that a process starts outside Ray: vLLM's engine core and its model inspection."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.spawn
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from openrlhf_gopo import platform
from openrlhf_gopo.platform import forks

POLL = 0.1  # seconds


class OnArrival:
    """Unpickling it calls ``function(*arguments)``."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return self.call


def activate_spawned(spawn: Any) -> None:
    """Patch of ``multiprocessing.spawn``: children are forks where they can be, and activate before they import
    anything else.

    vLLM's plugin hook is for this, but in 0.29.0 it runs after vLLM and transformers have been imported.
    """
    _call_first(spawn, platform.activate)
    forks.fork_spawned(spawn)


def end_spawned_with_this_process() -> None:
    """Processes that this one spawns from now on end when it is gone, however it went.

    vLLM 0.29.0's engine core waits for requests for ever once its client was killed, and keeps its memory; one whose
    client dies before it answers waits for five minutes.
    """
    _call_first(multiprocessing.spawn, end_with_parent)


def end_with_parent() -> None:
    """End this process, which was spawned, when the one that spawned it is gone."""

    def watch() -> None:
        while (parent := multiprocessing.parent_process()) is None:  # it is still being unpickled
            time.sleep(POLL)
        parent.join()  # the end of a pipe, not of a process number: a fork of another process has another parent
        os._exit(1)

    threading.Thread(target=watch, name="gopo-end-with-parent", daemon=True).start()


def _call_first(spawn: Any, function: Callable[..., None], *arguments: Any) -> None:
    get_preparation_data = spawn.get_preparation_data

    @functools.wraps(get_preparation_data)
    def with_call(name: str) -> dict[str, Any]:
        # The first thing that a child unpickles; keys that multiprocessing does not know are ignored.
        return {**get_preparation_data(name), f"openrlhf_gopo.{function.__name__}": OnArrival(function, *arguments)}

    spawn.get_preparation_data = with_call


def inspect_models_in_process(registry: Any) -> None:
    """Patch of ``vllm.model_executor.models.registry``.

    vLLM looks at a model's class in a subprocess of its own only to keep CUDA uninitialised; on CPU that costs seconds
    and the subprocess would not be activated.
    """
    registry._run_in_subprocess = lambda function: function()
