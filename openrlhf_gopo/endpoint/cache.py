"""What an endpoint answered, by request: in memory, or in an SQLite file that processes of one machine may share."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from openrlhf_gopo.errors import ConfigError, DialogueError

_WAIT = 5.0  # seconds for another process that writes


class Cache:
    """Text by key; the first value that was put stays. ``path`` None: in memory, for as long as this object lives.

    ``flag``: the one that gave ``path``.

    Raises:
        ConfigError: ``path`` cannot be opened, or is another kind of file.
    """

    def __init__(self, path: str | None, flag: str) -> None:
        self._lock, self._told_of = threading.Lock(), f"{flag} {path}"
        try:
            self._base = sqlite3.connect(path or ":memory:", timeout=_WAIT, check_same_thread=False)
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._base.execute("SELECT request, answer FROM answers LIMIT 1")
        except (sqlite3.Error, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
            where = os.path.abspath(path or "")
            raise ConfigError(
                f"{flag} {path}: cannot keep answers in {where} ({error}); name a new file, or one that an "
                "earlier run made"
            ) from error

    def get(self, key: str) -> str | None:
        """The value of ``key``, or None.

        Raises:
            DialogueError: the file is damaged, or another process holds it for seconds.
        """
        with self._lock, self._told():
            row = self._base.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
        if row is not None and not isinstance(row[0], str):
            raise self._broken(f"an answer is {type(row[0]).__name__}")
        return row[0] if row else None

    def put(self, key: str, value: str) -> str:
        """Keep ``value`` unless there is one already; the value that is kept.

        Raises:
            DialogueError: as ``get``.
        """
        with self._lock, self._told(), self._base:
            self._base.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, value))
        kept = self.get(key)
        if kept is None:
            raise self._broken("what was put is not there")
        return kept

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:  # a damaged or locked file; text that is no UTF-8
            raise self._broken(str(error)) from error

    def _broken(self, why: str) -> DialogueError:
        return DialogueError(f"{self._told_of}: cannot keep answers there ({why}); name a new file")
