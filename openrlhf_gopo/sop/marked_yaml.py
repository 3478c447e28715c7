"""YAML with the line of every field, and without the parts of YAML that a data file does not need.

Refused before anything is built: files over ``MAX_BYTES``, nesting over ``MAX_DEPTH``, anchors, aliases and merge keys
(a few lines of them can expand to gigabytes), tags, several documents, and keys given twice.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from openrlhf_gopo.errors import DataError, Where

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_NUMBER = 2**63
Lines = dict[Where, int]


def read_yaml(path: Path) -> tuple[object, Lines]:
    """The content of a YAML file, and the line (from 1) of every field, list item and key by its place.

    Raises:
        DataError: the file is missing, too large, not UTF-8, empty, no YAML, or uses what is refused.
    """
    text = _read(path)
    try:
        _refuse_features(path, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: Lines = {}
        content = None if node is None else _build(path, node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(filter(None, (error.context, error.problem)))
        raise DataError(f"{path}:{line}: not valid YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DataError(f"{path}:{line}: character U+{error.character:04X}: not allowed in YAML; remove it") from error
    if content is None:
        raise DataError(f"{path}:1: empty; an SOP needs at least its name and strategies")
    return content, lines


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes, the limit for an SOP; split it into several files")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte 0x{data[error.start]:02x}: not UTF-8; save the file as UTF-8") from error


def _refuse_features(path: Path, text: str) -> None:
    """One pass over the parser's events: nothing is built and nothing expands, whatever the file holds."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1  # type: ignore[union-attr]  # every event of a parser has its mark
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise DataError(f"{path}:{line}: '---': a second document; keep one SOP in a file")
        if not isinstance(event, yaml.NodeEvent):
            depth -= isinstance(event, yaml.CollectionEndEvent)
            continue
        if event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise DataError(
                f"{path}:{line}: {sign}{event.anchor}: anchors and aliases are refused; write the value out"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise DataError(f"{path}:{line}: {tag}: tags are refused; write a plain value")
        depth += isinstance(event, yaml.CollectionStartEvent)
        if depth > MAX_DEPTH:
            raise DataError(f"{path}:{line}: nested more than {MAX_DEPTH} levels deep; an SOP needs 5")


def _build(path: Path, node: yaml.Node, at: Where, lines: Lines) -> object:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(path, item, (*at, index), lines) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            value = yaml.SafeLoader("").construct_object(node)
            if isinstance(value, int) and abs(value) > MAX_NUMBER:  # Python refuses to print one of 5,000 digits
                raise ValueError("too large a number")
        except (ValueError, OverflowError) as error:  # it looks like a date or a number and is none
            field = ".".join(map(str, at))
            given = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
            raise DataError(f"{path}:{lines[at]}: {field}: {given!r}: {error}; put it in quotes") from error
        return value
    found: dict[str, object] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise DataError(f"{path}:{line}: {key.id} as a key: a field name is a word")
        place = (*at, key.value)
        if key.value in found:
            raise DataError(f"{path}:{line}: {key.value}: given twice, first in line {lines[place]}; keep one")
        lines[place] = line
        found[key.value] = _build(path, value, place, lines)
    return found
