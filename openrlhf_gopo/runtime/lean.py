"""Training processes without vLLM: OpenRLHF's package imports it everywhere, only the driver and the engines use it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import ray

NAMES = ("vllm", "vllm.inputs", "vllm.utils")  # what openrlhf/trainer/ray/vllm_engine.py imports (0.11.2)


class _Absent(ModuleType):
    """Any name imported from it is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # whoever asks is told, as before, that vLLM is installed
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def without_vllm() -> Iterator[None]:
    """Within: in a Ray worker that has not imported vLLM, its names are stand-ins. Elsewhere nothing changes.

    ``openrlhf.trainer.ray`` imports its engine module first: seconds of CPU time in every process that trains.
    """
    if "vllm" in sys.modules or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        yield
        return
    sys.modules.update({name: _Absent(name) for name in NAMES})
    try:
        yield
    finally:
        for name in NAMES:
            del sys.modules[name]
