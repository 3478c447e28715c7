"""torchvision and torchaudio built for CUDA beside a CPU torch: hidden, because importing them fails."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torchaudio", "torchvision")


def hide_what_cuda_builds_break() -> None:
    """Make them look as if not installed, which the stack copes with.

    pip takes them from the main index, built for CUDA, even when torch came from the CPU index; then the import of
    almost any transformers 5.15.0 model dies with "operator torchvision::nms does not exist".
    """
    for package in PACKAGES:
        if package not in sys.modules and _mismatched(package):
            sys.modules[package] = None  # type: ignore[assignment]  # the documented way to block an import


def _mismatched(package: str) -> bool:
    try:
        return version("torch").endswith("+cpu") and not version(package).endswith("+cpu")
    except PackageNotFoundError:
        return False
