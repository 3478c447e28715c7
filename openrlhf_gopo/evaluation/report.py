"""A results folder that a person can read: tables, learning curves, and an HTML page to read dialogues side by side."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.curves import write_learning_curves
from openrlhf_gopo.evaluation.summary import Interval, Summary, paired_difference, slices, summarise
from openrlhf_gopo.types import StopReason, Trajectory

__all__ = ["table_text", "write_learning_curves", "write_results", "write_slices", "write_table", "write_transcripts"]

# metric -> (column title, digits after the point); other metrics follow in alphabetical order with three digits
COLUMNS = {
    "tse": ("TSE (0-100)", 1),
    "success": ("success", 3),
    "esndcg": ("ESNDCG", 3),
    "gre": ("GRE", 3),
    "realised": ("realised", 3),
    "grounded": ("grounded", 3),
    "no_repetition": ("no repetition", 3),
    "sop": ("SOP compliance", 3),
    "invalid": ("invalid decisions", 3),
    "engagement": ("engagement", 3),
    "turns": ("turns", 2),
}
SLICE_METRICS = ("tse", "success", "turns")
PAGE_LIMIT = 1000  # dialogues in one HTML page; a browser stays quick, and the page says when it shows fewer than all

Phases = Mapping[str, Sequence[Trajectory]]


@dataclass(frozen=True)
class Row:
    """One line of the table: a policy, or the difference of two."""

    name: str
    metrics: Mapping[str, Interval]
    counts: tuple[str, str, str]  # goals, dialogues, failures
    difference: bool = False


def _rows(results: Mapping[str, Summary]) -> list[Row]:
    """A row per policy, then each later policy minus the first one where they share goals."""
    rows = [Row(name, s.metrics, (str(s.goals), str(s.dialogues), str(s.failures))) for name, s in results.items()]
    (base, first), *others = results.items()
    for name, summary in others:
        try:
            difference = paired_difference(first, summary)
        except DataError:  # no common goals: there is no paired difference to show
            continue
        rows.append(Row(f"{name} - {base}", difference.metrics, (str(difference.goals), "", ""), difference=True))
    return rows


def _columns(rows: Iterable[Row]) -> list[str]:
    found = {metric for row in rows for metric in row.metrics}
    return [metric for metric in COLUMNS if metric in found] + sorted(found - COLUMNS.keys())


def _title(metric: str) -> str:
    return COLUMNS.get(metric, (metric, 3))[0]


def _cell(interval: Interval | None, metric: str, signed: bool = False) -> str:
    """``mean [low, high]``; "-" where the metric is absent, "[n/a]" where one goal gives no interval."""
    if interval is None:
        return "-"
    digits = COLUMNS.get(metric, (metric, 3))[1]
    # rounding first, and adding 0.0, turns the "-0.000" of floating-point noise into 0.000
    mean, low, high = (
        f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"
        for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [n/a]" if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _grid(results: Mapping[str, Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the main table, as text."""
    rows = _rows(results)
    metrics = _columns(rows)
    header = ["policy", "goals", "dialogues", "failed", *map(_title, metrics)]
    cells = [[row.name, *row.counts, *(_cell(row.metrics.get(m), m, row.difference) for m in metrics)] for row in rows]
    return header, cells


def _stop_grid(results: Mapping[str, Summary]) -> tuple[list[str], list[list[str]]]:
    reasons = [r.value for r in StopReason if any(r.value in s.stops for s in results.values())]
    return ["policy", *reasons], [[n, *(f"{s.stops.get(r, 0.0):.1%}" for r in reasons)] for n, s in results.items()]


def _markdown(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    def line(values: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(v.split()).replace("|", "\\|").replace("<", "&lt;") for v in values) + " |\n"

    return line(header) + "|---" * len(header) + "|\n" + "".join(map(line, cells))


def _write(path: Path, text: str) -> Path:
    # User text may hold lone surrogates, which UTF-8 cannot encode: show them escaped rather than fail.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


def table_text(results: Mapping[str, Summary]) -> str:
    """The Markdown that ``write_table`` writes."""
    return (
        f"{_markdown(*_grid(results))}\n"
        "Mean over goals [95% bootstrap interval over goals]. Differences are paired over the goals shared.\n"
        "Failed dialogues are counted and enter no metric.\n\n"
        f"Stop reasons, share of the dialogues that did not fail:\n\n{_markdown(*_stop_grid(results))}"
    )


def write_table(results: Mapping[str, Summary], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write ``path`` with the suffixes .md and .csv: a row per policy, then the differences to the first policy.

    Raises:
        ValueError: ``results`` is empty.
    """
    if not results:
        raise ValueError("write_table needs at least one policy")
    path = Path(path)
    rows = _rows(results)
    metrics = _columns(rows)
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        bounds = [column for m in metrics for column in (m, f"{m}_low", f"{m}_high")]
        writer.writerow(["policy", "goals", "dialogues", "failed", *bounds])
        for row in rows:
            found = [row.metrics.get(m) for m in metrics]
            numbers = [number for i in found for number in ((i.mean, i.low, i.high) if i else ("", "", ""))]
            writer.writerow([row.name, *row.counts, *numbers])
    return _write(path.with_suffix(".md"), table_text(results)), path.with_suffix(".csv")


def _slice_grid(phases: Phases) -> tuple[list[str], list[list[str]]]:
    groups = {name: slices(trajectories) for name, trajectories in phases.items()}
    names = dict.fromkeys(name for by_slice in groups.values() for name in by_slice)
    cells = []
    for name in names:
        for phase, by_slice in groups.items():
            summary = summarise(by_slice.get(name, []))
            values = (_cell(summary.metrics.get(metric), metric) for metric in SLICE_METRICS)
            cells.append([name, phase, str(summary.goals), *values])
    return ["slice", "policy", "goals", *map(_title, SLICE_METRICS)], cells


def write_slices(phases: Phases, path: str | os.PathLike[str]) -> Path:
    """Write a Markdown table of the main metrics by task and by persona trait."""
    return _write(Path(path), _markdown(*_slice_grid(phases)))


def write_transcripts(
    phases: Phases, html: str | os.PathLike[str], curves: str | os.PathLike[str] | None = None
) -> Path:
    """Write one self-contained page: summary, the PNG ``curves`` if given, and a reader with filters and comparison.

    Nothing is loaded from elsewhere, and no text of a dialogue can become markup. Beyond ``PAGE_LIMIT`` dialogues the
    page holds whole goals up to that number, in order, and says so.
    """
    loader = jinja2.PackageLoader("openrlhf_gopo.evaluation", "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    script, style = (loader.get_source(env, name)[0].replace("\r\n", "\n") for name in ("reader.js", "report.css"))
    results = {name: summarise(trajectories) for name, trajectories in phases.items()}
    shown = list(_limited(phases))
    page = env.get_template("report.html.jinja").render(
        summary=_grid(results) if results else ([], []),
        stops=_stop_grid(results),
        slices=_slice_grid(phases),
        curves=_data_uri(Path(curves)) if curves else None,
        data=_script_json({"phases": list(phases), "stops": [r.value for r in StopReason], "dialogues": shown}),
        shown=len(shown),
        total=sum(map(len, phases.values())),
        script=Markup(script),  # our own file, as is
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
    )
    return _write(Path(html), page)


def _limited(phases: Phases) -> Iterator[dict[str, Any]]:
    """The page's records, goal by goal so that a limit never tears before and after apart."""
    by_goal: dict[str, list[dict[str, Any]]] = {}
    for index, trajectories in enumerate(phases.values()):
        for trajectory in trajectories:
            by_goal.setdefault(trajectory.goal.id, []).append(_page_record(trajectory, index))
    room = PAGE_LIMIT
    for records in by_goal.values():
        room -= len(records)
        if room < 0:
            return
        yield from records


def _page_record(trajectory: Trajectory, phase: int) -> dict[str, Any]:
    """What the reader shows of a dialogue: all of it but streams and the goal's private data."""
    goal = {name: value for name, value in vars(trajectory.goal).items() if name != "data"}
    record = {name: value for name, value in vars(trajectory).items() if name not in ("goal", "streams", "turns")}
    turns = [dict(vars(turn)) for turn in trajectory.turns]
    return {**record, "goal": goal, "turns": turns, "phase": phase, "done": trajectory.completed}


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types: NaN and infinities become null, floats are shortened, the unknown becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, StopReason):
        return value.value
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _script_json(value: Any) -> Markup:
    """JSON for a script element: ASCII, and with no character that could end the element or open a comment."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def write_results(
    folder: str | os.PathLike[str], phases: Phases, metrics_jsonl: str | os.PathLike[str] | None = None
) -> dict[str, Path]:
    """Write table.md, table.csv, slices.md, transcripts.html and, with metrics, learning_curves.png; return the paths.

    ``phases`` maps a policy or phase ("before training", "after training") to its scored dialogues; the first one is
    what the others are compared with.

    Raises:
        ValueError: ``phases`` is empty.
        DataError: the metrics file is missing or malformed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    if metrics_jsonl is not None:
        paths["learning_curves"] = write_learning_curves(metrics_jsonl, folder / "learning_curves.png")
    results = {name: summarise(trajectories) for name, trajectories in phases.items()}
    paths["table"], paths["csv"] = write_table(results, folder / "table")
    paths["slices"] = write_slices(phases, folder / "slices.md")
    paths["transcripts"] = write_transcripts(phases, folder / "transcripts.html", paths.get("learning_curves"))
    return paths
