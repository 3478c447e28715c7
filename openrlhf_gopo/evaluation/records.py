"""Trajectories on disk: JSON lines, one dialogue per line, each the ``Trajectory.to_json()`` of one dialogue."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

logger = logging.getLogger(__name__)

Check = Callable[[Any], Any]  # returns the value in its Python type, or raises _BadField


class _BadField(Exception):
    """A value that breaks the layout; ``path`` grows outwards: "" -> "[0]" -> "turns[0]"."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message, self.path = message, path


def append_trajectory(path: str | os.PathLike[str], trajectory: Trajectory) -> None:
    """Append one line, see ``append_line``.

    Raises:
        DataError: the goal holds a value that JSON cannot express.
    """
    try:
        # ASCII on purpose: user text may hold lone surrogates, which UTF-8 cannot encode.
        line = json.dumps(trajectory.to_json()).encode("ascii") + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"trajectory of goal {trajectory.goal.id!r}: {error}; "
            "keep context, facts and persona to strings, numbers, lists and maps, and put the rest in goal.data"
        ) from error
    append_line(path, line)


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Append in a single write, so that writers sharing the file never interleave within a line.

    A line left unfinished by a killed writer is closed first: the new one stays readable.
    """
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read_trajectories(
    path: str | os.PathLike[str], torn: Literal["error", "skip"] = "error", streams: bool = True
) -> list[Trajectory]:
    """Read what ``append_trajectory`` wrote; blank lines are skipped, ``goal.data`` is empty.

    Unknown keys at the top of a record are ignored (a writer may add a step number), elsewhere they are errors.
    ``torn="skip"`` leaves out, with a warning in the log, a last line that a killed writer left unfinished: no newline
    at its end, and no JSON. ``streams=False`` leaves the streams out unread, most of a file that has them.

    Raises:
        DataError: the file is missing, or a record breaks the layout; names ``file:line:field``.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such trajectories file; give the .jsonl that the rollout wrote")
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found.append(_parse(line, f"{path}:{number}", streams))
            except _NotJson:
                if torn == "error" or line.endswith(b"\n"):
                    raise
                lost = "the writer was killed within this last line; it is left out"
                logger.warning("%s:%d: %s, the %d dialogues before it are used", path, number, lost, len(found))
    return found


class _NotJson(DataError):
    """A line that is no JSON: at the end of a file, the mark of a killed writer."""


def _parse(line: bytes, where: str, streams: bool) -> Trajectory:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number too long; nested too deeply
        raise _NotJson(f"{where}: not JSON ({error}); a killed writer leaves such a line: delete it") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    known = {key: value for key, value in record.items() if key in _TRAJECTORY and (streams or key != "streams")}
    try:
        return _build(Trajectory, _TRAJECTORY, known)
    except _BadField as error:
        raise DataError(f"{where}:{error.path}: {error.message}") from error


def _build(cls: type, checks: Mapping[str, Check], record: Any) -> Any:
    """An instance of dataclass ``cls``; keys without a check are errors."""
    if not isinstance(record, dict):
        raise _BadField(f"expected an object, got {record!r:.80}")
    unknown = [key for key in record if key not in checks]
    if unknown:
        raise _BadField(f"unknown field of a {cls.__name__.lower()}", unknown[0])
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    missing = [name for name in checks if name in required and name not in record]
    if missing:
        raise _BadField(f"missing from the {cls.__name__.lower()}", missing[0])
    return cls(**{key: _within(key, checks[key], value) for key, value in record.items()})


def _within(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except _BadField as error:
        joint = "" if not error.path or error.path.startswith("[") else "."
        raise _BadField(error.message, name + joint + error.path) from None


def _is(kind: str, *types: type) -> Check:
    def check(value: Any) -> Any:
        # bool is an int in Python, but `true` where a number belongs is a mistake.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _BadField(f"expected {kind}, got {value!r:.80}")
        return value

    return check


def _list_of(check: Check, kind: type = list) -> Check:
    def check_all(value: Any) -> Any:
        items = _is("a list", list)(value)
        return kind(_within(f"[{index}]", check, item) for index, item in enumerate(items))

    return check_all


def _map_of(check: Check) -> Check:
    def check_all(value: Any) -> dict[str, Any]:
        return {key: _within(f"[{key!r:.80}]", check, item) for key, item in _is("an object", dict)(value).items()}

    return check_all


def _stop(value: Any) -> StopReason:
    try:
        return StopReason(value)
    except ValueError:
        raise _BadField(f"expected one of {', '.join(StopReason)}, got {value!r:.80}") from None


def _span(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise _BadField(f"expected [start, end], got {value!r:.80}")
    start, end = (_whole(item) for item in value)
    return start, end


def _number(value: Any) -> float:
    try:
        return float(_is("a number", int, float)(value))
    except OverflowError:
        raise _BadField(f"expected a number below 1e308, got one of {value.bit_length()} bits") from None


def _grade(value: Any) -> int:
    if _whole(value) not in (0, 1, 2, 3):
        raise _BadField(f"expected a grade from 0 to 3, got {value!r:.80}")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _optional_flag(value: Any) -> bool | None:
    return None if value is None else _flag(value)


def _anything(value: Any) -> Any:
    return value


_text = _is("a string", str)
_flag = _is("true or false", bool)
_whole = _is("a whole number", int)
_texts = _list_of(_text, tuple)

_GOAL: dict[str, Check] = {
    "id": _text,
    "intent": _text,
    "context": _text,
    "subgoals": _map_of(_number),
    "facts": _map_of(_text),
    "persona": _map_of(_anything),
    "split": _text,
}
_TURN: dict[str, Check] = {
    "user": _text,
    "allowed": _texts,
    "strategy": _text,
    "reply": _text,
    "briefing": _text,
    "expected": _texts,
    "relevance": _map_of(_grade),
    "probabilities": _map_of(_number),
    "events": _texts,
    "completed": _texts,
    "engagement": _number,
    "on_task": _flag,
    "plan": _text,
    "version": _whole,
    "expert_logprob": _number,
    "forced": _flag,
    "reply_cut": _flag,
    "invalid": _optional_flag,
    "reply_group": _list_of(_number, tuple),
}
_STREAM: dict[str, Check] = {
    "tokens": _list_of(_whole),
    "spans": _list_of(_span),
    "logprobs": _list_of(_number),
    "allowed": _list_of(_list_of(_whole)),
}
_TRAJECTORY: dict[str, Check] = {
    "goal": lambda value: _build(Goal, _GOAL, value),
    "sample": _whole,
    "seed": _whole,
    "turns": _list_of(lambda value: _build(Turn, _TURN, value)),
    "stop": _stop,
    "streams": _map_of(lambda value: _build(Stream, _STREAM, value)),
    "rewards": _map_of(_number),
    "error": _optional_text,
    "user": _optional_text,
}
