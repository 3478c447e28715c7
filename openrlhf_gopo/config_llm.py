"""How endpoints of language models are asked: one dataclass per user of an endpoint. Standard library only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from openrlhf_gopo.flag import check_values, flag, require


@dataclass(frozen=True)
class LlmConfig:
    """``--gopo.llm.*``: how the user simulator ``llm:MODEL@URL`` asks its endpoint. The key itself is no part of it.

    ``prefix``: what the names of its flags begin with.
    """

    prefix: ClassVar[str] = "gopo.llm"

    temperature: float = flag(0.7, "sampling temperature")
    max_new_tokens: int = flag(80, "token cap of one answer")
    timeout: float = flag(15.0, "seconds of one request; all tries together stay below --gopo.user_timeout")
    attempts: int = flag(4, "tries of a request that meets 429, 5xx, a timeout or a broken connection")
    concurrency: int = flag(16, "requests under way at once, per process (one per vLLM engine of the responder)")
    budget_requests: int = flag(None, "requests of one process, tries included, after which dialogues fail", kind=int)
    budget_tokens: int = flag(None, "tokens of one process, prompts included, after which dialogues fail", kind=int)
    cache: str = flag(None, "SQLite file that keeps every answer: equal seeds replay without a request", kind=str)
    api_key_env: str = flag("OPENAI_API_KEY", "environment variable that holds the key, if the endpoint wants one")
    extra_body: str = flag(
        None, "JSON object merged into every request; a null takes a field out, as max_tokens for some models", kind=str
    )

    def __post_init__(self) -> None:
        check_values(self, self.prefix)
        require(self.temperature >= 0, f"--{self.prefix}.temperature", self.temperature, "give 0 or more")
        require(self.timeout > 0, f"--{self.prefix}.timeout", self.timeout, "give a positive number of seconds")
        for name in ("max_new_tokens", "attempts", "concurrency", "budget_requests", "budget_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{self.prefix}.{name}", value, "give 1 or more")
        require(
            re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env) is not None,
            f"--{self.prefix}.api_key_env",
            "(not shown)",  # somebody may have given the key itself
            "give the name of an environment variable, not the key",
        )
        self.extra()

    def extra(self) -> dict[str, Any]:
        """``extra_body`` as an object."""
        try:
            extra = json.loads(self.extra_body or "{}")
        except (ValueError, RecursionError):
            extra = None
        require(
            isinstance(extra, dict),
            f"--{self.prefix}.extra_body",
            self.extra_body,
            'give a JSON object, as {"top_p": 1}',
        )
        return extra


@dataclass(frozen=True)
class JudgeConfig(LlmConfig):
    """``--gopo.judge.*``: how the reward ``judge:MODEL@URL`` asks its endpoint, and what it judges by."""

    prefix: ClassVar[str] = "gopo.judge"

    temperature: float = flag(0.0, "sampling temperature")
    max_new_tokens: int = flag(300, "token cap of one answer")
    timeout: float = flag(25.0, "seconds of one request; all tries together stay below --gopo.reward_timeout")
    cache: str = flag(None, "SQLite file that keeps every answer: equal transcripts cost one request", kind=str)
    rubric: str = flag(
        None, "text file that says what earns which score; default: RUBRIC of openrlhf_gopo/rewards/judge.py", kind=str
    )
