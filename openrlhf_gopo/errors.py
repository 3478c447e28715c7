"""The errors a user can meet. Every message names the flag or ``file:line:field``, the value, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable

Where = tuple[str | int, ...]  # the place of a field in a file: ("rules", 2, "after", 0)


# What a terminal obeys or a reader cannot see: controls but line feed and tab, and marks that reorder text.
_UNSEEN = {c: f"\\x{c:02x}" for c in (*range(9), *range(11, 32), *range(127, 160))}
_UNSEEN |= {c: f"\\u{c:04x}" for c in (0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str) -> str:
    """``text`` as it may be printed: what a terminal would obey, and lone surrogates, are written as escapes."""
    return text.translate(_UNSEEN).encode("utf-8", "backslashreplace").decode("utf-8")


class GopoError(Exception):
    """Base of every error raised on purpose by this package. As text it is fit for a terminal (``visible``)."""

    def __str__(self) -> str:
        return visible(super().__str__())


class ConfigError(GopoError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(GopoError):
    """A file or record that breaks its documented layout."""


class SopError(GopoError):
    """An SOP that contradicts itself, or a choice that an SOP forbids.

    ``problems``: all that is wrong with an SOP, each with its place; whoever read it from a file knows the lines.
    """

    def __init__(self, message: str, problems: Iterable[tuple[Where, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class StreamError(GopoError):
    """A chat template or text from which no exact token stream can be built."""


class DialogueError(GopoError):
    """An environment, user simulator or reward that broke its contract during one dialogue."""


class CheckpointError(GopoError):
    """A checkpoint that cannot be written or does not fit."""


class WorkerError(GopoError):
    """A process of the run that died: a model's actor, a rollout actor or an inference engine."""
