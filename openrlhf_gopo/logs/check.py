"""Reading and checking files of logged dialogues, one line at a time.

Memory does not grow with the file but for one hash and one line number per dialogue id, less than 200 bytes: that is
how duplicates are found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError
from tqdm import tqdm

from openrlhf_gopo.envs.base import SPLITS, Environment
from openrlhf_gopo.errors import DataError
from openrlhf_gopo.logs.schema import CONTRADICTION, Dialogue, Problem
from openrlhf_gopo.logs.trajectory import ENGAGEMENT

MAX_LINE = 16 * 2**20  # bytes
SHOWN = 20  # problems told one by one
Check = Callable[[Dialogue], Iterable[Problem]]

_ONE_PER_LINE = "write each dialogue as one JSON object on one line"
# How a file that is no UTF-8 text of JSON lines begins, and what to do about it.
_STARTS = {
    b"\xef\xbb\xbf": ("a UTF-8 byte-order mark", "save the file as UTF-8 without one"),
    b"\xff\xfe": ("a UTF-16 byte-order mark", "convert the file to UTF-8"),
    b"\xfe\xff": ("a UTF-16 byte-order mark", "convert the file to UTF-8"),
    b"\x1f\x8b": ("gzip's signature", "unpack the file"),
    b"[": ("a JSON array", _ONE_PER_LINE),
}
# pydantic's error type -> what to do; the rest is a value of a wrong type.
_REMEDIES = {
    "missing": "add it",
    "extra_forbidden": "remove it, or correct its name",
    "string_too_long": "shorten it, or split it over several turns",
    "too_long": "split the dialogue, or leave out what is not needed",
    "too_short": "give at least one",
    "enum": "use one of those",
    "string_unicode": "replace the broken character",
}


@dataclass
class Report:
    """What a file holds: ``found`` problems in all, of which ``problems`` are the first, as ``file:line:field`` texts.

    ``dialogues`` are the good ones, with ``turns`` turns; ``unlabelled`` of these have no strategy, ``neutral`` have
    neither an engagement nor a known event.
    """

    dialogues: int = 0
    turns: int = 0
    unlabelled: int = 0
    neutral: int = 0
    found: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, dialogue: Dialogue) -> None:
        """Add a good dialogue."""
        self.dialogues += 1
        self.turns += len(dialogue.turns)
        for turn in dialogue.turns:
            self.unlabelled += turn.strategy is None
            self.neutral += turn.engagement is None and ENGAGEMENT.keys().isdisjoint(turn.events)


def validate(
    path: str | os.PathLike[str], check: Check | None = None, shown: int = SHOWN, progress: bool = False
) -> Report:
    """Check every line of ``path``, and each dialogue with ``check`` (see ``fits``); the first ``shown`` are texts.

    ``progress`` shows a bar on a terminal.

    Raises:
        DataError: no such file.
    """
    report = Report()
    for _, found in _scan(Path(path), check, progress):
        if isinstance(found, Dialogue):
            report.count(found)
        else:
            report.found += len(found)
            report.problems += found[: max(0, shown - len(report.problems))]
    return report


def read(path: str | os.PathLike[str], check: Check | None = None) -> Iterator[tuple[int, Dialogue]]:
    """Line number and dialogue, in file order.

    Raises:
        DataError: no such file, or the first problem in it, as ``file:line:field: problem: remedy``.
    """
    for line, found in _scan(Path(path), check, progress=False):
        if not isinstance(found, Dialogue):
            raise DataError(found[0])
        yield line, found


def fits(env: Environment) -> Check:
    """A check that intents, strategies and allowed strategies are those of ``env``."""
    samples = {goal.intent: goal for split in SPLITS for goal in env.goals(split)}
    catalogues = {intent: {s.id for s in env.catalogue(goal)} for intent, goal in samples.items()}

    def check(dialogue: Dialogue) -> Iterator[Problem]:
        known = catalogues.get(dialogue.goal.intent)
        if known is None:
            problem = f"{dialogue.goal.intent!r} is no intent of the environment {env.name}"
            yield "goal.intent", problem, f"use one of: {_some(catalogues)}"
            return
        for index, turn in enumerate(dialogue.turns):
            strategies = (("strategy", turn.strategy), *(("allowed", strategy) for strategy in turn.allowed or ()))
            for name, strategy in strategies:
                if strategy is not None and strategy not in known:
                    problem = f"{strategy!r} is not in the catalogue of {env.name} for {dialogue.goal.intent}"
                    yield f"turns[{index}].{name}", problem, f"use one of: {_some(known)}"

    return check


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """pydantic's errors as problems."""
    items = error.errors(include_url=False)
    outer = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    for item in items:
        kind, value, loc = item["type"], item["input"], item["loc"]
        where = _field(loc)
        # A list whose items are all bad is not also too short.
        if kind == "too_short" and loc in outer:
            continue
        if kind == CONTRADICTION:
            yield from item["ctx"]["problems"]
        elif kind == "string_pattern_mismatch":
            yield where, f"{_short(value)} {_misfit(loc, value)}", "correct the text"
        elif kind in _REMEDIES:
            got = "" if kind in ("missing", "extra_forbidden") or isinstance(value, (list, dict)) else _got(value)
            yield where, item["msg"] + got, _REMEDIES[kind]
        else:
            yield where, item["msg"] + _got(value), "correct the value (`logs schema` prints the format)"


def _scan(path: Path, check: Check | None, progress: bool) -> Iterator[tuple[int, Dialogue | list[str]]]:
    """Line number, and the dialogue or the problems of that line; blank lines are skipped."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a .jsonl file of dialogues")
    seen: dict[int, int] = {}  # hash of an id -> its line
    empty = True
    # The bar writes to a terminal only.
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None if progress else True)
    with path.open("rb") as file, bar:
        for line, start, raw in _lines(file):
            bar.update(file.tell() - start)
            stranger = line == 1 and next((s for s in _STARTS if raw.startswith(s)), None)
            if stranger:
                what, remedy = _STARTS[stranger]
                yield line, [f"{path}:{line}: the file begins with {what}: {remedy}"]
                return
            if not raw.strip():
                continue
            empty = False
            found = _parse(raw, start)
            if isinstance(found, Dialogue):
                problems = [*_twice(found, line, seen), *(check(found) if check else ())]
            else:
                problems = found
            told = [f"{path}:{line}:{where}{':' if where else ''} {what}: {remedy}" for where, what, remedy in problems]
            yield line, told or found  # type: ignore[misc]  # without problems it is a dialogue
    if empty:
        yield 1, [f"{path}:1: the file holds no dialogue: {_ONE_PER_LINE}"]


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Line number, byte offset, and the bytes; of an overlong line its first ``MAX_LINE`` + 1 bytes."""
    number = start = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            while (rest := file.readline(2**16)) and not rest.endswith(b"\n"):
                pass
        yield number, start, raw
        start = file.tell()


def _parse(raw: bytes, start: int) -> Dialogue | list[Problem]:
    if len(raw) > MAX_LINE:
        return [("", f"the line is longer than {MAX_LINE} bytes", "split the dialogue, or shorten its texts")]
    try:
        return Dialogue.model_validate_json(raw)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] != "json_invalid":
            return list(problems_of(error))
        return [_unreadable(raw, start, str(error.errors()[0]["ctx"]["error"]))]


def _unreadable(raw: bytes, start: int, reason: str) -> Problem:
    """Why a line is no JSON. Lone surrogates are legal in JSON's grammar, but are no text."""
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at position {error.start} of the line, {start + error.start} of the file"
        return "", f"not UTF-8: {byte}", "convert the file to UTF-8"
    except json.JSONDecodeError as error:
        return f"column {error.colno}", f"not JSON ({error.msg})", _ONE_PER_LINE
    except (RecursionError, ValueError):  # nested too deeply; a number too long
        return "", f"not readable ({reason})", _ONE_PER_LINE
    where = _surrogate(value)
    if where is None:
        return "", f"not readable ({reason})", _ONE_PER_LINE
    return where, "a lone surrogate (half of a character)", "replace the broken character"


def _surrogate(value: Any, where: str = "") -> str | None:
    """The field of the first text in ``value`` that UTF-8 cannot encode."""
    if isinstance(value, str):
        return where if any("\ud800" <= character <= "\udfff" for character in value) else None
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        if any(_surrogate(key, "key") for key in value):
            return where or "a key"
        items = ((f"{where}.{key}" if where else key, item) for key, item in value.items())
    elif isinstance(value, list):
        items = ((f"{where}[{index}]", item) for index, item in enumerate(value))
    return next((found for path, item in items if (found := _surrogate(item, path)) is not None), None)


def _twice(dialogue: Dialogue, line: int, seen: dict[int, int]) -> Iterator[Problem]:
    digest = int.from_bytes(blake2b(dialogue.id.encode(), digest_size=8).digest(), "big")
    first = seen.setdefault(digest, line)
    if first != line:
        yield "id", f"{dialogue.id!r} is also the id of line {first}", "give each dialogue an id of its own"


def _field(loc: tuple[int | str, ...]) -> str:
    """``("turns", 3, "user")`` as ``turns[3].user``; pydantic's own marks of keys and unions stay out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":
            text += f".{part}" if text else part
    return text


def _misfit(loc: tuple[int | str, ...], value: Any) -> str:
    """Why a text breaks its pattern."""
    if "\x00" in value:
        return f"holds a NUL character at position {value.index(chr(0))}"
    if not value.strip():
        return "is blank"
    if loc[-1] == "language":
        return "is no BCP 47 language tag, such as en or pt-BR"
    return "has white space around it, or control characters"


def _got(value: Any) -> str:
    return f", got {_short(value)}"


def _short(value: Any) -> str:
    # Cut before repr: the value may be as long as the line.
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")
