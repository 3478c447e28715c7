"""The few functions of ``torch.cuda`` that OpenRLHF calls without asking for a device first."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


class CpuDevice(str):
    """What ``current_device()`` returns without CUDA. As it stands it names the device ``cpu``; formatted it is an
    index, because OpenRLHF 0.11.2 also writes ``torch.device(f"cuda:{torch.cuda.current_device()}")``."""

    def __format__(self, spec: str) -> str:
        return format(0, spec)


def stand_in(torch: ModuleType) -> None:
    """Replace what would raise "No CUDA GPUs are available"; ``is_available`` keeps telling the truth."""
    cpu = CpuDevice("cpu")
    torch.cuda.current_device = lambda: cpu
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, _nothing())


def _nothing() -> Callable[..., None]:
    """One function for each name: torch._dynamo keeps a table of them and refuses the same object twice."""
    return lambda *args, **kwargs: None
