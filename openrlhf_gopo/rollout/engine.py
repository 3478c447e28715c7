"""What a rollout asks of an inference engine. No engine is imported here: the runtime adapts vLLM to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    ``allowed``: the only token ids that may be sampled, or None for the whole vocabulary. ``stop_token`` ends the
    continuation and is part of it. ``probabilities``: return the log-probabilities of all ``allowed``, too.
    ``n``: how many continuations, drawn independently.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token: int | None = None
    allowed: tuple[int, ...] | None = None
    probabilities: bool = False
    n: int = 1


@dataclass(frozen=True)
class Generation:
    """Sampled token ids with the log-probability of each under the distribution it was sampled from.

    ``allowed_logprobs``: of the first token, in the order of ``Sampling.allowed``; empty unless asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    allowed_logprobs: Sequence[float] = ()


Generate = Callable[[list[int], Sampling], Awaitable[list[Generation]]]
"""Continues a prompt ``Sampling.n`` times."""
