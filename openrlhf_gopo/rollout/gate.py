"""Where dialogues wait while the weights of both roles change."""

from __future__ import annotations

import asyncio


class Gate:
    """Passed once per turn, or once per dialogue: ``async with gate``. ``version`` counts the updates of the weights
    that play what is inside; it changes only while nobody is.

    Of one event loop; not thread-safe.
    """

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self._inside = 0
        self._opened, self._empty = asyncio.Event(), asyncio.Event()
        self._opened.set()
        self._empty.set()

    async def __aenter__(self) -> Gate:
        while not self._opened.is_set():  # it may be closed again before a waiter wakes up
            await self._opened.wait()
        self._inside += 1
        self._empty.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def close(self) -> None:
        """Let nobody in, and return when the last one is out."""
        self._opened.clear()
        await self._empty.wait()

    def open(self, version: int) -> None:
        """Let them in, to weights of ``version``."""
        self.version = version
        self._opened.set()
