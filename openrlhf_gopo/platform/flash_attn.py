"""OpenRLHF imports flash-attn (CUDA only) in one module, for packing and ring attention: give it names to import."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def stand_ins() -> Iterator[None]:
    """While ``openrlhf.models.ring_attn_utils`` is imported, and no longer: other libraries look whether flash_attn
    can be imported, and must find that it cannot."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    modules = _modules()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _modules() -> dict[str, ModuleType]:
    from einops import rearrange

    contents: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.bert_padding": {
            "index_first_axis": _needs_cuda,
            "pad_input": _needs_cuda,
            "unpad_input": _needs_cuda,
            "rearrange": rearrange,
        },
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": _needs_cuda},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, attributes in contents.items():
        vars(modules[name]).update(attributes)
    return modules


def _needs_cuda(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("--ds.packing_samples and --ds.ring_attn_size > 1 need flash-attn, which needs CUDA")
