"""SOP files: a YAML file becomes a ``Procedure``, or a list of ``file.yaml:LINE: field: value: remedy``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from openrlhf_gopo.errors import DataError, SopError, Where
from openrlhf_gopo.sop.marked_yaml import Lines, read_yaml
from openrlhf_gopo.sop.rules import Part, Rule, Sop
from openrlhf_gopo.sop.schema import RuleModel, SopModel, fields_at
from openrlhf_gopo.types import Strategy


@dataclass(frozen=True)
class Procedure:
    """A catalogue with its SOP. ``file`` and ``lines`` say where each field stands, when they came from a file."""

    strategies: tuple[Strategy, ...]
    sop: Sop
    file: str = ""
    lines: Mapping[Where, int] = field(default_factory=dict)

    def parts(self) -> dict[str, Sop]:
        """The SOP of each part; {} without parts."""
        return {part.name: self.sop.part(part.name) for part in self.sop.parts}

    def locate(self, where: Where) -> str:
        """``file.yaml:LINE`` of a field, or of the nearest one around it; "" when there is no file."""
        return f"{self.file}:{_line(self.lines, where)}" if self.file else ""


def load_sop(path: str | Path) -> Procedure:
    """Read and check an SOP file; ``schema.py`` is its form, and its names are those of ``Strategy`` and ``Sop``.

    Raises:
        DataError: the file cannot be read, or does not have that form. One line for every problem.
        SopError: the SOP contradicts itself. One line for every problem.
    """
    path = Path(path)
    content, lines = read_yaml(path)
    try:
        model = SopModel.model_validate(content)
    except ValidationError as error:
        raise DataError("\n".join(_layout_problems(path, error, lines))) from error
    strategies = tuple(Strategy(**_fields(entry)) for entry in model.strategies)
    lines.update({("strategies", s.id): lines["strategies", index] for index, s in enumerate(strategies)})
    problems = [*_strategy_facts(model)]
    try:
        sop = _sop(model)
    except SopError as error:
        problems += error.problems
    if problems:
        text = (f"{path}:{_line(lines, where)}: {_dotted(where)}: {message}" for where, message in problems)
        raise SopError("\n".join(text), problems)
    return Procedure(strategies, sop, str(path), lines)


def _sop(model: SopModel) -> Sop:
    parts = [
        Part(**{**_fields(part), "rules": _rules(part.rules, ("parts", index))})
        for index, part in enumerate(model.parts)
    ]
    lists = {"strategies": tuple(s.id for s in model.strategies), "rules": _rules(model.rules), "parts": tuple(parts)}
    return Sop(**{**_fields(model), **lists})


def _rules(rules: Iterable[RuleModel], at: Where = ()) -> tuple[Rule, ...]:
    return tuple(Rule(**_fields(rule), at=(*at, "rules", index)) for index, rule in enumerate(rules))


def _fields(model: BaseModel) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in model}


def _strategy_facts(model: SopModel) -> Iterator[tuple[Where, str]]:
    for index, strategy in enumerate(model.strategies):
        for position, fact in enumerate(strategy.asks):
            if model.facts and fact not in model.facts:
                known = ", ".join(model.facts)
                yield ("strategies", index, "asks", position), f"{fact!r}: unknown fact; list it in facts ({known})"


# Messages -------------------------------------------------------------------------------------------------------

# pydantic's kind of error -> the remedy; the others speak for themselves.
_REMEDIES = {
    "missing": "missing; add it",
    "string_type": "not text; put it in quotes",
    "list_type": "not a list; write [one, another]",
    "model_type": "not a mapping; write field: value",
    "bool_type": "neither true nor false",
    "int_type": "not a whole number",
}


def _layout_problems(path: Path, error: ValidationError, lines: Lines) -> Iterator[str]:
    for problem in error.errors():
        where: Where = problem["loc"]
        kind, value = problem["type"], repr(problem["input"])
        remedy = _REMEDIES.get(kind, problem["msg"])
        if kind == "extra_forbidden":
            remedy = f"no such field; choose one of {', '.join(fields_at(where[:-1]))}"
        elif kind == "string_pattern_mismatch":
            remedy = _misfit(problem["input"], word=problem["ctx"]["pattern"].startswith(r"^[^\s,"))
        shown = "" if kind == "missing" else f"{value if len(value) <= 60 else value[:57] + '...'}: "
        yield f"{path}:{_line(lines, where)}: {_dotted(where) or 'the file'}: {shown}{remedy}"


def _misfit(text: str, word: bool) -> str:
    if not text.strip():
        return "blank; write some text"
    if word and any(character == "," or character.isspace() for character in text):
        return "not one word; leave out spaces and commas"
    return "has control characters; leave them out"


def _line(lines: Mapping[Where, int], where: Where) -> int:
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)


def _dotted(where: Where) -> str:
    """``rules.3.after``, as pydantic writes places; the numbers count from 0."""
    return ".".join(map(str, where))
