"""Published data sets as logged dialogues. To add one: a function like ``records`` below, and its line in ``SOURCES``.

``records(folder)`` yields, per dialogue, where it stands in the source (for error messages) and its record in the JSON
form of ``schema.Dialogue``, which is checked here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openrlhf_gopo.envs import BUILTIN, load_environment
from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.logs import abcd, mgshop, multiwoz, played, star
from openrlhf_gopo.logs.check import problems_of, validate
from openrlhf_gopo.logs.schema import Dialogue

Source = Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]

SOURCES: dict[str, Source] = {
    "abcd": abcd.records,
    "mgshop": mgshop.records,
    "multiwoz": multiwoz.records,
    "star": star.records,
}


def convert(
    source: str, folder: str | os.PathLike[str], out: str | os.PathLike[str], *, through_env: bool = False
) -> int:
    """Write ``out``, whole or not at all; returns the number of dialogues.

    ``through_env``: the dialogues as the environment of that name plays them (see ``played``), not as they were held.

    Raises:
        ConfigError: no such source.
        DataError: the source is missing, malformed, or has a dialogue that breaks the schema.
    """
    folder, out = Path(folder), Path(out)
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name the .jsonl file to write")
    dialogues = converted(source, folder, through_env)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for dialogue in dialogues:
                file.write(dialogue.model_dump_json(exclude_defaults=True) + "\n")
        report = validate(part)  # what single dialogues do not show: ids that occur twice, or none at all
        if report.found:
            raise DataError(f"{folder}: {report.problems[0].removeprefix(f'{part}:')}")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return report.dialogues


def converted(source: str, folder: str | os.PathLike[str], through_env: bool = False) -> Iterator[Dialogue]:
    """The dialogues of a data set one by one; raises at once, or at the dialogue, what ``convert`` raises."""
    if source not in SOURCES:
        raise ConfigError(f"source {source!r}: no such converter; choose one of {', '.join(sorted(SOURCES))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that holds the {source} data")
    if through_env and source not in BUILTIN:
        choices = ", ".join(sorted(BUILTIN.keys() & SOURCES.keys()))
        raise ConfigError(f"--played: {source} is no environment; leave the flag out, or convert one of {choices}")
    found = played.records(load_environment(source, str(folder)), folder) if through_env else SOURCES[source](folder)
    return (_dialogue(where, record) for where, record in found)


def _dialogue(where: str, record: dict[str, Any]) -> Dialogue:
    try:
        return Dialogue.model_validate_json(json.dumps(record))
    except ValidationError as error:
        field, what, remedy = next(problems_of(error))
        raise DataError(f"{where}: {field}: {what}: {remedy}") from error
