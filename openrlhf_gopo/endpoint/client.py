"""One model behind an OpenAI-compatible chat endpoint: retries, a concurrency limit, a budget and a cache.

Limits and budgets hold per process; every rollout actor has its own. The key is read from the environment for each
request, and never stored: it is in no attribute, message, pickle or file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from openrlhf_gopo.config import LlmConfig
from openrlhf_gopo.endpoint.cache import Cache
from openrlhf_gopo.endpoint.post import Poster, excerpt, without
from openrlhf_gopo.errors import ConfigError, DialogueError

logger = logging.getLogger(__name__)

REPORT_EVERY = 200  # requests between two log lines with the usage


@dataclass
class Usage:
    """What was asked so far: ``requests`` sent, tries included; tokens as the endpoint counted; answers ``cached``."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Answer:
    """``cut``: the text ends at the token cap."""

    text: str
    cut: bool


class Endpoint:
    """``model`` at ``url``, which ends where ``/chat/completions`` follows. Thread-safe; pickles without state.

    ``given``: how the user named it, up to the model, as in "--gopo.user llm"; ``config``: the settings, whose own
    flags begin with ``config.prefix``.

    Raises:
        ConfigError: ``url`` cannot be one, or holds more than a place; the key cannot be one; the cache is no SQLite
            file.
    """

    def __init__(self, given: str, model: str, url: str, config: LlmConfig) -> None:
        self.given, self.model, self.url, self.config = given, model, checked_url(given, model, url), config
        self.flag = f"{given}:{model}@{self.url}"  # begins every message
        self.settings = f"--{config.prefix}"
        self.usage = Usage()
        self._cache = Cache(config.cache, f"{self.settings}.cache")
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(config.concurrency)
        remedy = f"{self.settings}.timeout and {self.settings}.attempts say how long it is tried"
        self._poster = Poster(self.flag, config.timeout, config.attempts, remedy, config.concurrency)
        self._key()

    @classmethod
    def from_name(cls, flag: str, name: str, config: LlmConfig) -> Endpoint:
        """From ``KIND:MODEL@URL``, the value (or part of it) of ``flag``.

        Raises:
            ConfigError: it is not of that form, or see the class.
        """
        kind = name.partition(":")[0]
        found = re.fullmatch(r"\w+:(.+?)@(\w+://.+)", name)
        if found is None:  # a mistyped URL may carry a password
            raise ConfigError(
                f"{flag} {name.partition('@')[0]}: write {kind}:MODEL@URL, as in "
                f"{kind}:Qwen/Qwen3-8B@http://localhost:8000/v1"
            )
        return cls(f"{flag} {kind}", found[1], found[2], config)

    def __reduce__(self) -> tuple[Any, ...]:
        return Endpoint, (self.given, self.model, self.url, self.config)

    def chat(self, messages: list[dict[str, str]], seed: int, until: float) -> Answer:
        """The model's answer; from the cache where an equal request was answered before.

        Args:
            seed: of the sampling. until: ``time.monotonic()`` at which to give up.

        Raises:
            DialogueError: refused, out of tries, time or budget, or an answer that is none.
        """
        body = {"model": self.model, "messages": messages, "seed": seed, "temperature": self.config.temperature}
        body |= {"max_tokens": self.config.max_new_tokens} | self.config.extra()
        body = {name: value for name, value in body.items() if value is not None}
        key = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        kept = self._cache.get(key)
        if kept is None:
            answer = self._ask(body, until)
            kept = self._cache.put(key, json.dumps(asdict(answer)))  # of two equal requests at once, the first counts
        else:
            with self._lock:
                self.usage.cached += 1
        return self._kept(kept)

    def _kept(self, text: str) -> Answer:
        """An answer from the cache, a file that others may have written."""
        try:
            answer = Answer(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            answer = None
        if answer is None or not isinstance(answer.text, str) or not isinstance(answer.cut, bool):
            raise DialogueError(
                f"{self.flag}: {self.settings}.cache {self.config.cache}: holds no answer but {text[:80]!r}; name a "
                "new file"
            )
        return answer

    def _ask(self, body: dict[str, Any], until: float) -> Answer:
        variable = f"the environment variable {self.config.api_key_env}"
        hints = {
            401: f"set the key in {variable} ({self.settings}.api_key_env) wherever rollouts run",
            403: f"the key in {variable} may not use this model",
            404: "check the model's name, and that the URL ends where /chat/completions follows, mostly in /v1",
            400: f"{self.settings}.extra_body can add or take out fields of the request",
        }
        url = f"{self.url}/chat/completions"
        raw = self._poster.post(url, body, until, key=self._key(), hints=hints, around=lambda: self._turn(until))
        return self._read(raw)

    @contextmanager
    def _turn(self, until: float) -> Iterator[None]:
        """A place among the requests under way, paid from the budget."""
        left = until - time.monotonic()
        if left <= 0 or not self._free.acquire(timeout=left):
            raise DialogueError(
                f"{self.flag}: no turn among {self.settings}.concurrency {self.config.concurrency} requests in the "
                "time that its caller has; raise one of them"
            )
        try:
            self._spend()
            yield
        finally:
            self._free.release()

    def _key(self) -> str:
        """The key; "" for an endpoint that wants none."""
        key = os.environ.get(self.config.api_key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", key):  # httpx's own error would show it
            raise ConfigError(
                f"{self.settings}.api_key_env {self.config.api_key_env}: what this environment variable holds cannot "
                "be a key: it has blanks or characters beyond ASCII"
            )
        return key

    def _spend(self) -> None:
        """Count one request, while the budget lasts."""
        with self._lock:
            for flag, used in (("budget_requests", self.usage.requests), ("budget_tokens", self.usage.tokens)):
                budget = getattr(self.config, flag)
                if budget is not None and used >= budget:
                    raise DialogueError(
                        f"{self.flag}: {self.settings}.{flag} {budget} is spent in this process ({self.usage.requests} "
                        f"requests, {self.usage.tokens} tokens); raise it, or set {self.settings}.cache"
                    )
            self.usage.requests += 1
            if self.usage.requests % REPORT_EVERY == 0:
                logger.info("%s: %s", self.flag, self.usage)

    def _read(self, raw: bytes) -> Answer:
        """The text in a chat completion; counts its tokens."""
        try:
            reply = json.loads(raw)
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
            prompt, completion = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError):
            raise DialogueError(f"{self.flag}: not a chat completion: {excerpt(raw)}") from None
        if not isinstance(text, str):
            raise DialogueError(f"{self.flag}: a chat completion without text: {excerpt(raw)}")
        if self.config.budget_tokens is not None and prompt + completion == 0:
            raise DialogueError(
                f"{self.flag}: does not count tokens, {self.settings}.budget_tokens {self.config.budget_tokens} cannot "
                f"be kept; use {self.settings}.budget_requests"
            )
        text = without(self._key(), text)  # an echo that was written with JSON's escapes
        with self._lock:
            self.usage.prompt_tokens += prompt
            self.usage.completion_tokens += completion
        return Answer(text, cut)


def request_seed(key: str) -> int:
    """31 bits of ``key``, which names all that a request's chance may depend on."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


def checked_url(given: str, model: str, url: str) -> str:
    """``url`` without a closing slash.

    Raises:
        ConfigError: it cannot be one, or holds more than a place.
    """
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):  # a lone surrogate, a label that IDNA refuses
        parts = httpx.URL()
    if parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(  # what the URL holds may be secret
            f"{given}:{model}@URL: the URL has a user, a query or a fragment; leave them out, and put the key into an "
            "environment variable (the flag that ends in .api_key_env)"
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"{given}:{model}@{url}: not a URL; write one as in http://localhost:8000/v1")
    return url.rstrip("/")
