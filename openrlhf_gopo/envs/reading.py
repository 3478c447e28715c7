"""What the readers of published data sets share: JSON with errors that name ``file:line:field``, and text helpers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openrlhf_gopo.errors import ConfigError, DataError

HELDOUT_PERCENT = 20
MAX_UNPACKED = 1 << 30  # bytes; the largest of these data sets has a quarter of it
MAX_WORDS = 60  # of one replayed utterance: the reader keeps a verbatim prefix
CLEAR = {"yes", "no", "true", "false", "n/a", "none"}  # values that occur in any text: never found by looking


def folder(name: str, data: str | None, layout: str) -> Path:
    """The folder ``--gopo.data`` of the environment ``name``; ``layout`` says what belongs there.

    Raises:
        ConfigError: ``data`` is None.
        DataError: it is no folder.
    """
    if data is None:
        raise ConfigError(f"--gopo.data None: the environment {name} needs its data; {layout}")
    if not os.path.isdir(data):  # False too for a name that is too long, where Path.is_dir raises
        raise DataError(f"--gopo.data {data}: no such folder; {layout}")
    return Path(data)


def parse(text: bytes, path: str, first_line: int = 1) -> Any:
    """The JSON value in ``text``, which starts at line ``first_line`` of ``path``.

    Raises:
        DataError: it is not JSON, or not UTF-8; names file, line and column or byte.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}:column {error.colno}: not JSON ({error.msg}); restore the file") from error
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}:byte {error.start}: not UTF-8 ({error.reason}); restore the file") from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits; nested too deeply
        raise DataError(f"{path}:{first_line}: not readable ({error}); restore the file") from error


def unpacked(read: Callable[[int], bytes], path: Path) -> bytes:
    """What an opened archive or member of one holds; ``read`` reads so many bytes of it at most.

    Raises:
        DataError: more than ``MAX_UNPACKED`` bytes: a few packed ones can be made to fill any memory.
    """
    raw = read(MAX_UNPACKED + 1)
    if len(raw) > MAX_UNPACKED:
        raise DataError(f"{path}: unpacks to more than {MAX_UNPACKED} bytes (reading.MAX_UNPACKED); fetch it again")
    return raw


def as_object(value: Any, path: str, line: int = 1) -> dict[str, Any]:
    """``value``, checked to be a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: expected a JSON object, got {type(value).__name__}")
    return value


def get(record: Any, key: str, kind: type | tuple[type, ...], where: str, prefix: str = "") -> Any:
    """``record[key]``, checked to be of ``kind``.

    Raises:
        DataError: it is missing or of another type; names ``where`` and the field.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}:{prefix}{key}: expected {expected}, got {value!r:.200}; restore the record")
    return value


def texts(record: Any, key: str, where: str, prefix: str = "") -> list[str]:
    """``record[key]``, checked to be a list of strings.

    Raises:
        DataError: as ``get``.
    """
    values = get(record, key, list, where, prefix)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{where}:{prefix}{key}[{index}]: expected str, got {value!r:.200}; restore the record")
    return values


def split_of(dialogue: str) -> str:
    """``heldout`` for about ``HELDOUT_PERCENT`` of all ids, by a hash that never changes; else ``train``."""
    digest = hashlib.sha256(dialogue.encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT else "train"


def shorten(text: str) -> str:
    """The first ``MAX_WORDS`` words of ``text``, verbatim."""
    words = list(re.finditer(r"\S+", text))
    return text.strip() if len(words) <= MAX_WORDS else text[words[0].start() : words[MAX_WORDS - 1].end()]


def mentions(text: str, value: str) -> bool:
    """Whether ``text`` names ``value``, up to case, punctuation and ``2 pm``/``2pm``, ``26th``/``26``."""
    plain = _normal(value)
    if not plain or plain in CLEAR:
        return False
    ordinal = re.fullmatch(r"(\d+)(?:st|nd|rd|th)", plain)
    found = f" {_normal(text)} "
    return f" {plain} " in found or (ordinal is not None and f" {ordinal.group(1)} " in found)


def _normal(text: str) -> str:
    words = " ".join(re.findall(r"[a-z0-9]+", text.casefold()))
    return re.sub(r"(\d+) (am|pm|st|nd|rd|th)\b", r"\1\2", words)
