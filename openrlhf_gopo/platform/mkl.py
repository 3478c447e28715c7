"""MKL's vector functions, which may be wrong in the fourth digit when threads call one for the first time together."""

from __future__ import annotations

from types import ModuleType

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"),
    *("rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"),
)


def settle(torch: ModuleType) -> None:
    """Patch of ``torch``: call each once, in one thread.

    MKL chooses a function's kernel at its first call. A second thread that enters meanwhile may run one of low accuracy
    (pytorch/pytorch#188792), and torch splits a call of more than 2,048 elements over its threads. The first thing of
    that size is a table or a batch of rotary angles: in about 1 of 50 processes it was wrong by up to 2e-4, which made
    an engine's log-probabilities wrong by 1e-4 for as long as it ran. Forks inherit the choice.
    """
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(half)
