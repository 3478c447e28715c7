"""What an endpoint answered, by request: in memory, or in an SQLite file that processes of one machine may share."""

from __future__ import annotations

import os
import sqlite3
import threading

from openrlhf_gopo.errors import ConfigError

_WAIT = 5.0  # seconds for another process that writes


class Cache:
    """Text by key; the first value that was put stays. ``path`` None: in memory, for as long as this object lives.

    ``flag``: the one that gave ``path``.

    Raises:
        ConfigError: ``path`` cannot be opened, or is another kind of file.
    """

    def __init__(self, path: str | None, flag: str) -> None:
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(path or ":memory:", timeout=_WAIT, check_same_thread=False)
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._base.execute("SELECT request, answer FROM answers LIMIT 1")
        except sqlite3.Error as error:
            where = os.path.abspath(path or "")
            raise ConfigError(
                f"{flag} {path}: cannot keep answers in {where} ({error}); name a new file, or one that an "
                "earlier run made"
            ) from error

    def get(self, key: str) -> str | None:
        """The value of ``key``, or None."""
        with self._lock:
            row = self._base.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, value: str) -> str:
        """Keep ``value`` unless there is one already; the value that is kept."""
        with self._lock, self._base:
            self._base.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, value))
        kept = self.get(key)
        assert kept is not None
        return kept
