"""Reads MultiWOZ 2.1 (arXiv 1907.01669, MIT) in the layout its authors publish. Knows files and fields only.

data.json, else val.json     {id: {"goal": {domain: {"info", "reqt", "book", "fail_info", "fail_book"}}, "log": [turn]}}
                             turn: {"text", "dialog_act": {act: [[slot, value]]}}, of user and system in alternation
valListFile, testListFile    one id a line, with or without .json at either end
db/<domain>_db.json          [row]; in older releases beside data.json

A .json file may also be zipped (val.json.zip).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from openrlhf_gopo.envs.base import HumanDialogue, HumanTurn
from openrlhf_gopo.envs.reading import as_object, folder, get, parse, shorten, split_of, texts, unpacked
from openrlhf_gopo.envs.replayed import BYE
from openrlhf_gopo.errors import DataError

LAYOUT = "point --gopo.data at a folder with MultiWOZ 2.1's data.json or val.json (or .zip) and its db/<domain>_db.json"
DOMAINS = ("restaurant", "hotel", "attraction", "train", "taxi", "hospital", "police")
TITLES = ("leaveAt", "name", "department")  # the field that names a row: the first that it has
# What zipfile raises: no member, damaged, encrypted (RuntimeError), packed in an unknown way (NotImplementedError).
_NO_ZIP = (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, zlib.error, ValueError, OSError)
Acts = Mapping[str, Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Want:
    """What the user wants in one domain. ``fail_info`` and ``fail_book`` are what they try first, in vain."""

    info: Mapping[str, str]
    reqt: tuple[str, ...]
    book: Mapping[str, str]
    fail_info: Mapping[str, str]
    fail_book: Mapping[str, str]

    @property
    def final(self) -> dict[str, str]:
        """What it comes to once what fails was given up."""
        return {**self.book, **self.info}

    def instead(self, part: str) -> dict[str, str]:
        """What the user wants after the failure of the search (``part`` "info") or of the booking ("book")."""
        first, then = (self.fail_info, self.info) if part == "info" else (self.fail_book, self.book)
        return {slot: value for slot, value in then.items() if first.get(slot, value) != value}

    def tried(self, domain: str, failing: Collection[str]) -> dict[str, str]:
        """What the user tries while ``failing`` (``info:<domain>``, ``book:<domain>``) was not given up."""
        book = self.fail_book if f"book:{domain}" in failing else {}
        return {**self.book, **book, **self.info, **(self.fail_info if f"info:{domain}" in failing else {})}


@dataclass(frozen=True)
class Exchange:
    """A user's turn and the system's after it. ``strategy``: of the latter, ``ask:<slot>`` or one of the table."""

    user: str
    user_acts: Acts
    system: str
    system_acts: Acts
    strategy: str


@dataclass(frozen=True)
class Record:
    """One human dialogue."""

    id: str
    wants: Mapping[str, Want]
    log: tuple[Exchange, ...]
    split: str


@cache
def table() -> dict[str, Any]:
    """The act table that this package ships."""
    return yaml.safe_load(resources.files(__package__).joinpath("multiwoz_acts.yaml").read_text(encoding="utf-8"))


def read(data: str | None) -> tuple[dict[str, list[dict[str, Any]]], list[Record]]:
    """The database by domain and the dialogues in file order.

    The ids of valListFile and testListFile are held out of data.json. Where there is only val.json, a hash decides.

    Raises:
        ConfigError: ``data`` is None.
        DataError: the folder or a file is missing, or a record is malformed; names file, record and field.
    """
    root = folder("multiwoz", data, LAYOUT)
    path = next((p for name in ("data", "val") for p in (_find(root, f"{name}.json"),) if p), None)
    if path is None:
        raise DataError(f"--gopo.data {data}: neither data.json nor val.json in it; {LAYOUT}")
    database = {domain: _rows(root, domain) for domain in DOMAINS}
    listed = {id_ for p in root.glob("*ListFile*") if "train" not in p.name for id_ in _ids(p)}
    whole = path.name.startswith("data.")
    records = []
    for id_, value in as_object(_json(path), str(path)).items():
        split = ("heldout" if _id(id_) in listed else "train") if whole else split_of(_id(id_))
        records.append(_record(_id(id_), value, f"{path}:1:{id_}", split))
    if not records:
        raise DataError(f"{path}:1: no dialogue in it; {LAYOUT}")
    return database, records


def humans(records: Sequence[Record]) -> Iterator[HumanDialogue]:
    """Every dialogue as turns, with its goal: by domain what it wants."""
    for record in records:
        turns = tuple(HumanTurn(one.user, one.strategy, one.system, tuple(one.system_acts)) for one in record.log)
        yield HumanDialogue(record.id, dict(record.wants), turns)


def _id(name: str) -> str:
    return name.strip().removesuffix(".json")


def _ids(path: Path) -> list[str]:
    try:
        return [_id(line) for line in path.read_text(encoding="utf-8").split()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:byte {error.start}: not UTF-8 ({error.reason}); restore the file") from error


def _find(root: Path, name: str) -> Path | None:
    return next((p for p in (root / name, root / f"{name}.zip") if p.is_file()), None)


def _json(path: Path) -> Any:
    if path.suffix != ".zip":
        return parse(path.read_bytes(), str(path))
    try:
        with zipfile.ZipFile(path) as archive, archive.open(path.stem) as file:
            raw = unpacked(file.read, path)
    except _NO_ZIP as error:
        raise DataError(f"{path}: not a zip file that holds {path.stem} ({error}); fetch it again") from error
    return parse(raw, str(path))


def _rows(root: Path, domain: str) -> list[dict[str, Any]]:
    name = f"{domain}_db.json"
    path = _find(root / "db", name) or _find(root, name)
    if path is None:
        raise DataError(f"{root / 'db' / name}: no such file; {LAYOUT}")
    rows = _json(path)
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise DataError(f"{path}:1: expected a list of objects; restore the file")
    for index, row in enumerate(rows) if domain != "taxi" else ():
        if not any(name in row for name in TITLES):
            raise DataError(f"{path}:1:[{index}]: has none of {', '.join(TITLES)}; restore the row")
    for name in {"taxi_colors", "taxi_types"} & set(rows[0]):
        texts(rows[0], name, f"{path}:1", "[0].")
    return rows


def _record(id_: str, value: Any, where: str, split: str) -> Record:
    goal = get(value, "goal", dict, where)
    wants = {domain: _want(goal[domain], where, domain) for domain in DOMAINS if goal.get(domain)}
    log = get(value, "log", list, where)
    turns = [_turn(turn, where, index) for index, turn in enumerate(log)]
    exchanges = []
    for index in range(0, len(turns) - 1, 2):
        (user, asked), (system, acts) = turns[index], turns[index + 1]
        strategy = _strategy(acts, asked, f"{where}:log[{index + 1}].dialog_act")
        exchanges.append(Exchange(user, asked, system, acts, strategy))
    early = [index for index, one in enumerate(exchanges) if one.strategy == BYE][:-1]  # a dialogue ends once
    exchanges = [replace(one, strategy="reply") if i in early else one for i, one in enumerate(exchanges)]
    return Record(id_, wants, tuple(exchanges), split)


def _want(value: Any, where: str, domain: str) -> Want:
    def values(key: str) -> dict[str, str]:
        found = value.get(key) or {} if isinstance(value, dict) else None
        if not isinstance(found, dict):
            raise DataError(f"{where}:goal.{domain}.{key}: expected dict, got {found!r:.200}; restore the record")
        return {slot: str(v) for slot, v in found.items() if "invalid" not in slot}

    info = values("info")
    reqt = texts(value, "reqt", where, f"goal.{domain}.") if value.get("reqt") else ()
    return Want(info, tuple(reqt), values("book"), values("fail_info"), values("fail_book"))


def _turn(turn: Any, where: str, index: int) -> tuple[str, Acts]:
    text = shorten(" ".join(get(turn, "text", str, where, f"log[{index}].").split()))
    acts = turn.get("dialog_act", {})
    if isinstance(acts, str):  # "No Annotation"
        acts = {}
    if not isinstance(acts, dict) or not all(
        isinstance(pairs, list) and all(map(_pair, pairs)) for pairs in acts.values()
    ):
        raise DataError(f"{where}:log[{index}].dialog_act: expected act -> [[slot, value]], got {acts!r:.200}")
    return text, acts


def _pair(value: Any) -> bool:
    """Whether ``value`` is [slot, value]; some have no value, and some values are no text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _strategy(acts: Acts, asked: Acts, where: str) -> str:
    """The strategy of a system turn by the act table; "" without acts."""
    requested = {act.partition("-")[0] for act in asked if act.endswith("-Request")}
    found = {f"{act}:{pair[0]}" for act, pairs in acts.items() for pair in [*pairs, [""]]}
    found |= {f"*-{name.partition('-')[2]}" for name in found}
    found = {name.removesuffix(":") for name in found}
    if any(act.partition("-")[0] in requested and act.endswith(("-Inform", "-Recommend")) for act in acts):
        found.add("?")
    known = {name.partition(":")[0] for row in table()["acts"] for name in row[1:]}
    for act in acts:
        if act not in known and f"*-{act.partition('-')[2]}" not in known:
            raise DataError(f"{where}: unknown act {act!r}; multiwoz_acts.yaml of this package lists those of 2.1")
    for strategy, *names in table()["acts"]:
        if found.isdisjoint(names):
            continue
        if strategy != "ask":
            return str(strategy)
        slots = [pair[0] for act, pairs in acts.items() if act.endswith("-Request") for pair in pairs]
        slot = next((table()["slots"][name][0] for name in slots if name in table()["slots"]), None)
        if slot is not None:
            return f"ask:{slot}"
    return "reply" if acts else ""
