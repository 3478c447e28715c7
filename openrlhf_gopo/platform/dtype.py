"""float32 models, for processors without bfloat16 instructions: there bfloat16 is emulated, several times slower."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

FP32 = "fp32"
CPUINFO = Path("/proc/cpuinfo")
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86-64, and the last AArch64


def fastest(cpuinfo: Path = CPUINFO) -> str:
    """The value of ``--ds.param_dtype`` that this processor computes fastest: ``bf16`` or ``fp32``."""
    if not cpuinfo.is_file():  # not Linux; float32 is right everywhere
        return FP32
    lines = cpuinfo.read_text().splitlines()
    known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "bf16" if BF16_INSTRUCTIONS & set(known.split()) else FP32


def accept_fp32(module: Any) -> None:
    """Patch of ``openrlhf.utils.utils``, whose ``convert_to_torch_dtype`` knows bf16 and fp16 alone (0.11.2). With
    neither, DeepSpeed computes in float32."""
    convert = module.convert_to_torch_dtype

    @functools.wraps(convert)
    def convert_to_torch_dtype(param_dtype: str) -> Any:
        import torch

        return torch.float32 if param_dtype == FP32 else convert(param_dtype)

    module.convert_to_torch_dtype = convert_to_torch_dtype
