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
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import tenacity

from openrlhf_gopo.config import LlmConfig
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.users.cache import Cache

logger = logging.getLogger(__name__)
# At DEBUG it logs the headers of answers, and an endpoint may echo the key in one.
logging.getLogger("httpcore").setLevel(logging.INFO)

MAX_BODY = 1 << 20  # bytes of one answer
REPORT_EVERY = 200  # requests between two log lines with the usage
_KEY_LENGTH = 8  # a shorter one is a dummy, as in "EMPTY"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 20.0  # seconds of back-off, before jitter
_HINTS = {
    401: "set the key in the environment variable {key} (--gopo.llm.api_key_env) wherever rollouts run",
    403: "the key in the environment variable {key} may not use this model",
    404: "check the model's name, and that the URL ends where /chat/completions follows, mostly in /v1",
    400: "--gopo.llm.extra_body can add or take out fields of the request",
}


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


class _Transient(Exception):
    """Worth another try, after ``wait`` seconds at least."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class Endpoint:
    """``model`` at ``url``, which ends where ``/chat/completions`` follows. Thread-safe; pickles without state.

    Raises:
        ConfigError: ``url`` cannot be one, or holds more than a place; the key cannot be one; --gopo.llm.cache is no
            SQLite file.
    """

    def __init__(self, model: str, url: str, config: LlmConfig) -> None:
        self.model, self.url, self.config = model, _checked(model, url), config
        self.flag = f"--gopo.user llm:{model}@{self.url}"  # begins every message
        self.usage = Usage()
        self._cache = Cache(config.cache)
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(config.concurrency)
        self._client = httpx.Client(limits=httpx.Limits(max_connections=config.concurrency))
        self._backoff = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT)
        self._key()

    def __reduce__(self) -> tuple[Any, ...]:
        return Endpoint, (self.model, self.url, self.config)

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
                f"{self.flag}: --gopo.llm.cache {self.config.cache}: holds no answer but {text[:80]!r}; name a new file"
            )
        return answer

    def _ask(self, body: dict[str, Any], until: float) -> Answer:
        """POST with tries; see ``chat``."""

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(self._backoff(state), error.wait if isinstance(error, _Transient) else 0.0)

        def stop(state: tenacity.RetryCallState) -> bool:
            late = time.monotonic() + state.upcoming_sleep >= until
            return late or state.attempt_number >= self.config.attempts

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient), wait=wait, stop=stop, reraise=True
        )
        try:
            return self._read(retrying(self._post, body, until))
        except _Transient as error:
            tries = retrying.statistics["attempt_number"]
            problem = f"{error} after {tries} {'try' if tries == 1 else 'tries'}"
        raise DialogueError(
            f"{self.flag}: {problem}; --gopo.llm.timeout and --gopo.llm.attempts say how long it is tried"
        )

    def _post(self, body: dict[str, Any], until: float) -> bytes:
        """One request; the body of a 200."""
        left = until - time.monotonic()
        if left <= 0 or not self._free.acquire(timeout=left):
            raise DialogueError(
                f"{self.flag}: no turn among --gopo.llm.concurrency {self.config.concurrency} requests before "
                "--gopo.user_timeout; raise one of them"
            )
        try:
            self._spend()
            end = min(until, time.monotonic() + self.config.timeout)
            return self._send(body, end)
        except httpx.RequestError as error:  # of transport: no connection, cut off, timed out
            problem = f"{type(error).__name__} ({error})"
        finally:
            self._free.release()
        # Raised out here so that httpx's error, which holds the request and its key, is not its context.
        raise _Transient(problem)

    def _send(self, body: dict[str, Any], end: float) -> bytes:
        key = self._key()
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        left = max(0.01, end - time.monotonic())
        raw = b""
        with self._client.stream(
            "POST", f"{self.url}/chat/completions", json=body, headers=headers, timeout=left
        ) as response:
            for chunk in response.iter_bytes():
                raw += chunk
                if len(raw) > MAX_BODY:
                    raise DialogueError(f"{self.flag}: an answer of more than {MAX_BODY} bytes (endpoint.MAX_BODY)")
                if time.monotonic() > end:  # httpx times single reads, and an endpoint may drip
                    raise _Transient(f"no answer in --gopo.llm.timeout {self.config.timeout} s")
        if len(key) >= _KEY_LENGTH:  # some endpoints echo it
            raw = raw.replace(key.encode(), b"[key]")
        status = response.status_code
        if status == 429 or status >= 500:
            raise _Transient(f"status {status}: {_excerpt(raw)}", _seconds(response.headers.get("retry-after")))
        if status != 200:
            hint = _HINTS.get(status, "").format(key=self.config.api_key_env)
            raise DialogueError(f"{self.flag}: status {status}: {_excerpt(raw)}{'; ' if hint else ''}{hint}")
        return raw

    def _key(self) -> str:
        """The key; "" for an endpoint that wants none."""
        key = os.environ.get(self.config.api_key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", key):  # httpx's own error would show it
            raise ConfigError(
                f"--gopo.llm.api_key_env {self.config.api_key_env}: what this environment variable holds cannot be a "
                "key: it has blanks or characters beyond ASCII"
            )
        return key

    def _spend(self) -> None:
        """Count one request, while the budget lasts."""
        with self._lock:
            for flag, used in (("budget_requests", self.usage.requests), ("budget_tokens", self.usage.tokens)):
                budget = getattr(self.config, flag)
                if budget is not None and used >= budget:
                    raise DialogueError(
                        f"{self.flag}: --gopo.llm.{flag} {budget} is spent in this process ({self.usage.requests} "
                        f"requests, {self.usage.tokens} tokens); raise it, or set --gopo.llm.cache"
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
            raise DialogueError(f"{self.flag}: not a chat completion: {_excerpt(raw)}") from None
        if not isinstance(text, str):
            raise DialogueError(f"{self.flag}: a chat completion without text: {_excerpt(raw)}")
        if self.config.budget_tokens is not None and prompt + completion == 0:
            raise DialogueError(
                f"{self.flag}: does not count tokens, --gopo.llm.budget_tokens {self.config.budget_tokens} cannot be "
                "kept; use --gopo.llm.budget_requests"
            )
        key = self._key()
        if len(key) >= _KEY_LENGTH:  # an echo that was written with JSON's escapes
            text = text.replace(key, "[key]")
        with self._lock:
            self.usage.prompt_tokens += prompt
            self.usage.completion_tokens += completion
        return Answer(text, cut)


def _checked(model: str, url: str) -> str:
    """``url`` without a closing slash."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):  # a lone surrogate, a label that IDNA refuses
        parts = httpx.URL()
    if parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(  # what the URL holds may be secret
            f"--gopo.user llm:{model}@URL: the URL has a user, a query or a fragment; leave them out, and put the key "
            "into the environment variable of --gopo.llm.api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"--gopo.user llm:{model}@{url}: not a URL; write one as in http://localhost:8000/v1")
    return url.rstrip("/")


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; its other form, a date, is left to the back-off."""
    return float(header) if header and header.isdecimal() else 0.0


def _excerpt(raw: bytes) -> str:
    return repr(raw[:300].decode("utf-8", "replace"))
