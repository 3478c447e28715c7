"""One self-contained HTML page: tables, pictures, strategy flow, and a reader for thousands of dialogues.

The dialogues travel as blobs, each JSON, deflated, in base64: first an index of all dialogues (policy, goal, outcome,
strategies), enough to list, filter and count them, then ``CHUNK`` whole dialogues per blob, which the page unpacks only
when one of them is read or searched. A dialogue of eight turns takes 0.6 to 1 kB.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from openrlhf_gopo.evaluation.tables import Grid, Phases, Table, write_text
from openrlhf_gopo.types import StopReason, Trajectory

CHUNK = 100  # dialogues per blob
SCRIPTS = ("blobs.js", "heat.js", "dialogue.js", "reader.js")  # in this order, as one script


def write_page(
    html: str | os.PathLike[str], phases: Phases, table: Table, slices: Grid, pictures: Mapping[str, Path]
) -> Path:
    """Write the page; ``pictures`` maps a heading to a PNG.

    Nothing is loaded from elsewhere, and no text of a dialogue can become markup: the page's policy allows this
    project's script and no other.
    """
    loader = jinja2.PackageLoader("openrlhf_gopo.evaluation", "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    style, *parts = (loader.get_source(env, name)[0].replace("\r\n", "\n") for name in ("report.css", *SCRIPTS))
    script = "\n".join(parts)
    page = env.get_template("report.html.jinja").render(
        table=table,
        slices=slices,
        pictures={heading: _data_uri(png) for heading, png in pictures.items()},
        blobs=_blobs(phases),
        script=Markup(script),  # our own files, as they are
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
    )
    return write_text(html, page)


def _blobs(phases: Phases) -> Iterator[str]:
    """The index, then the chunks. Goal by goal, so that the dialogues read side by side share a chunk."""
    by_goal: dict[str, list[tuple[int, Trajectory]]] = {}
    for policy, trajectories in enumerate(phases.values()):
        for trajectory in trajectories:
            by_goal.setdefault(trajectory.goal.id, []).append((policy, trajectory))
    found = [pair for pairs in by_goal.values() for pair in pairs]
    yield _packed(_index(list(phases), found))
    for start in range(0, len(found), CHUNK):
        yield _packed([_record(trajectory) for _, trajectory in found[start : start + CHUNK]])


def _index(policies: list[str], found: list[tuple[int, Trajectory]]) -> dict[str, Any]:
    """What the page knows of every dialogue: numbers that point into lists of names."""
    stops = [reason.value for reason in StopReason]
    strategies: dict[str, int] = {}
    goals: dict[tuple[str, str], int] = {}
    rows = []
    for policy, t in found:
        goal = goals.setdefault((t.goal.id, t.goal.intent), len(goals))
        used = [strategies.setdefault(turn.strategy, len(strategies)) for turn in t.turns]
        rows.append([policy, goal, t.sample, stops.index(t.stop.value), t.rewards.get("tse"), used])
    return {
        "policies": policies,
        "stops": stops,
        "strategies": list(strategies),
        "goals": list(goals),
        "chunk": CHUNK,
        "dialogues": rows,
    }


def _record(trajectory: Trajectory) -> dict[str, Any]:
    """What the reader shows of a dialogue: all of it but streams and the goal's private data."""
    goal = {name: value for name, value in vars(trajectory.goal).items() if name != "data"}
    record = {name: value for name, value in vars(trajectory).items() if name not in ("goal", "streams", "turns")}
    return {**record, "goal": goal, "turns": [vars(turn) for turn in trajectory.turns], "done": trajectory.completed}


def _packed(value: Any) -> str:
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))  # ASCII: lone surrogates stay escaped
    return base64.b64encode(zlib.compress(text.encode("ascii"), level=6)).decode("ascii")


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types: NaN and infinities become null, floats are shortened, the unknown becomes text."""
    if isinstance(value, StopReason):
        return value.value
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)


def _data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
