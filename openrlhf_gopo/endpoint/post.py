"""A POST of JSON that is tried again: what the clients of HTTP services have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import httpx
import tenacity

from openrlhf_gopo.errors import DialogueError

MAX_BODY = 1 << 20  # bytes of one answer
# At DEBUG it logs the headers of answers, and an endpoint may echo the key in one.
logging.getLogger("httpcore").setLevel(logging.INFO)

_KEY_LENGTH = 8  # a shorter one is a dummy, as in "EMPTY"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 20.0  # seconds of back-off, before jitter


class _Transient(Exception):
    """Worth another try, after ``wait`` seconds at least."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class Poster:
    """Posts for ``flag``, which begins every message. Thread-safe.

    Args:
        timeout: seconds of one try. attempts: tries of a request that meets 429, 5xx, a timeout or a broken connection.
        remedy: how to allow it more, for messages. connections: at once; None: any number.
    """

    def __init__(self, flag: str, timeout: float, attempts: int, remedy: str, connections: int | None = None) -> None:
        self.flag, self.timeout, self.attempts, self.remedy = flag, timeout, attempts, remedy
        self._client = httpx.Client(limits=httpx.Limits(max_connections=connections))
        self._backoff = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT)

    def post(
        self,
        url: str,
        body: Mapping[str, Any],
        until: float,
        *,
        key: str = "",
        hints: Mapping[int, str] | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> bytes:
        """The body of a 200.

        Args:
            until: ``time.monotonic()`` at which to give up. key: sent as a bearer's, and cut out of what comes back.
            hints: remedies by status. around: entered anew for each try.

        Raises:
            DialogueError: refused, out of tries or time, an answer beyond ``MAX_BODY``, or what ``around`` raises.
        """

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(self._backoff(state), error.wait if isinstance(error, _Transient) else 0.0)

        def stop(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + state.upcoming_sleep >= until or state.attempt_number >= self.attempts

        def attempt() -> bytes:
            with around():
                return self._send(url, body, min(until, time.monotonic() + self.timeout), key, hints or {})

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient), wait=wait, stop=stop, reraise=True
        )
        try:
            return retrying(attempt)
        except _Transient as error:
            tries = retrying.statistics["attempt_number"]
            problem = f"{error} after {tries} {'try' if tries == 1 else 'tries'}"
        raise DialogueError(f"{self.flag}: {problem}; {self.remedy}")

    def _send(self, url: str, body: Mapping[str, Any], end: float, key: str, hints: Mapping[int, str]) -> bytes:
        try:
            status, retry_after, raw = self._exchange(url, body, end, key)
        except httpx.RequestError as error:  # of transport: no connection, cut off, timed out
            problem = f"{type(error).__name__} ({error})"
        else:
            raw = raw.replace(key.encode(), b"[key]") if len(key) >= _KEY_LENGTH else raw  # some endpoints echo it
            if status == 429 or status >= 500:
                raise _Transient(f"status {status}: {excerpt(raw)}", _seconds(retry_after))
            if status != 200:
                hint = f"; {hints[status]}" if status in hints else ""
                raise DialogueError(f"{self.flag}: status {status}: {excerpt(raw)}{hint}")
            return raw
        # Raised out here so that httpx's error, which holds the request and its key, is not its context.
        raise _Transient(problem)

    def _exchange(self, url: str, body: Mapping[str, Any], end: float, key: str) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body."""
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        left = max(0.01, end - time.monotonic())
        raw = b""
        with self._client.stream("POST", url, json=body, headers=headers, timeout=left) as response:
            for chunk in response.iter_bytes():
                raw += chunk
                if len(raw) > MAX_BODY:
                    raise DialogueError(f"{self.flag}: an answer of more than {MAX_BODY} bytes (endpoint.MAX_BODY)")
                if time.monotonic() > end:  # httpx times single reads, and an endpoint may drip
                    raise _Transient(f"no whole answer in {self.timeout:g} s")
        return response.status_code, response.headers.get("retry-after"), raw


def without(key: str, text: str) -> str:
    """``text`` with ``key`` cut out of it; a short one is a dummy."""
    return text.replace(key, "[key]") if len(key) >= _KEY_LENGTH else text


def excerpt(raw: bytes) -> str:
    """The beginning of an answer, for messages."""
    return repr(raw[:300].decode("utf-8", "replace"))


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; its other form, a date, is left to the back-off."""
    return float(header) if header and header.isdecimal() else 0.0
