"""Tables of evaluations as text: policies with intervals and p-values, stop reasons, slices; Markdown and CSV."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_gopo.evaluation.compare import Difference, compare
from openrlhf_gopo.evaluation.summary import Interval, Summary, slices, summarise
from openrlhf_gopo.types import StopReason, Trajectory

# metric -> (column title, digits after the point); other metrics follow in alphabetical order with three digits
COLUMNS = {
    "tse": ("TSE (0-100)", 1),
    "success": ("success", 3),
    **{f"pass_{2**power}": (f"pass^{2**power}", 3) for power in range(1, 11)},
    "esndcg": ("ESNDCG", 3),
    "gre": ("GRE", 3),
    "realised": ("realised", 3),
    "grounded": ("grounded", 3),
    "no_repetition": ("no repetition", 3),
    "bleu": ("BLEU", 1),
    "chrf": ("chrF", 1),
    "referenced": ("replies with a reference", 3),
    "sop": ("SOP compliance", 3),
    "invalid": ("invalid decisions", 3),
    "engagement": ("engagement", 3),
    "turns": ("turns", 2),
}
SLICE_METRICS = ("tse", "success", "turns")

Phases = Mapping[str, Sequence[Trajectory]]
Grid = tuple[list[str], list[list[str]]]  # header and cells


@dataclass(frozen=True)
class Table:
    """Policies, differences between them, and notes that a reader of the figures needs.

    ``compared``: row -> the row that it is compared with. ``Table.of`` does the statistics, once for all the forms
    below.
    """

    results: Mapping[str, Summary]
    differences: Mapping[str, Difference]
    compared: Mapping[str, str]
    notes: Sequence[str]

    @classmethod
    def of(cls, results: Mapping[str, Summary], compared: Mapping[str, str] | None = None) -> Table:
        """Compare every row of ``compared`` with its own; None: every later one with the first.

        Raises:
            ValueError: ``results`` is empty.
        """
        if not results:
            raise ValueError("a table needs at least one policy")
        base, *later = results
        compared = dict.fromkeys(later, base) if compared is None else compared
        differences, refused = compare(results, compared)
        notes = [
            "Mean over goals [95% bootstrap interval over goals]. Failed dialogues are counted and enter no metric."
        ]
        if differences:
            notes.append(
                "Differences are paired over the goals shared; "
                f"p: two-sided sign-flip test of the mean difference over goals{_family(differences, compared)}."
            )
        notes += [
            f"{name} and {compared[name]}: {difference.unpaired} goals are in one of them only and enter no difference."
            for name, difference in differences.items()
            if difference.unpaired
        ]
        return cls(results, differences, compared, [*notes, *(f"{reason}." for reason in refused.values())])

    @property
    def metrics(self) -> list[str]:
        """The metrics that any policy has, in the order of their columns."""
        found = {metric for summary in self.results.values() for metric in summary.metrics}
        return [metric for metric in COLUMNS if metric in found] + sorted(found - COLUMNS.keys())

    def grid(self) -> Grid:
        """A row per policy, then one per difference."""
        header = ["policy", "goals", "dialogues", "failed", *map(title, self.metrics)]
        cells = [
            [name, str(s.goals), str(s.dialogues), str(s.failures), *(cell(s.metrics.get(m), m) for m in self.metrics)]
            for name, s in self.results.items()
        ]
        for name, d in self.differences.items():
            values = (cell(d.metrics.get(m), m, d.p_holm.get(m)) for m in self.metrics)
            cells.append([self._minus(name), str(d.goals), "", "", *values])
        return header, cells

    def stops(self) -> Grid:
        """Stop reasons, as shares of the dialogues that did not fail."""
        found = self.results.items()
        reasons = [r.value for r in StopReason if any(r.value in s.stops for _, s in found)]
        return ["policy", *reasons], [[n, *(f"{s.stops.get(r, 0.0):.1%}" for r in reasons)] for n, s in found]

    def text(self) -> str:
        """Both grids and the notes in Markdown."""
        lines = "".join(f"{_escape(note)}\n" for note in self.notes)
        stops = f"Stop reasons, share of the dialogues that did not fail:\n\n{markdown(self.stops())}"
        return f"{markdown(self.grid())}\n{lines}\n{stops}"

    def write_csv(self, path: str | os.PathLike[str]) -> Path:
        """Plain numbers: per metric its mean and bounds, for a difference also its p-value, raw and corrected."""
        with Path(path).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            parts = [f"{m}{part}" for m in self.metrics for part in ("", "_low", "_high", "_p", "_p_holm")]
            writer.writerow(["policy", "goals", "dialogues", "failed", *parts])
            for name, s in self.results.items():
                numbers = (n for m in self.metrics for n in (*_numbers(s.metrics.get(m)), "", ""))
                writer.writerow([name, s.goals, s.dialogues, s.failures, *numbers])
            for name, d in self.differences.items():
                numbers = (
                    n
                    for m in self.metrics
                    for n in (*_numbers(d.metrics.get(m)), _number(d.p.get(m)), _number(d.p_holm.get(m)))
                )
                writer.writerow([self._minus(name), d.goals, "", "", *numbers])
        return Path(path)

    def _minus(self, name: str) -> str:
        return f"{name} - {self.compared[name]}"


def _family(differences: Mapping[str, Difference], compared: Mapping[str, str]) -> str:
    """What the p-values were corrected over, as the end of a sentence."""
    sizes = Counter(compared[name] for name in differences)
    if max(sizes.values()) == 1:
        return ""
    if len(sizes) == 1:
        return f", Holm-corrected over the {len(differences)} policies compared"
    return ", Holm-corrected over the policies compared with the same one"


def title(metric: str) -> str:
    """The heading of a metric's column."""
    return COLUMNS.get(metric, (metric, 3))[0]


def cell(interval: Interval | None, metric: str, p: float | None = None) -> str:
    """``mean [low, high]``, signed and with ``p`` for a difference; "-" where the metric is absent, "[n/a]" where one
    goal gives no interval."""
    if interval is None:
        return "-"
    digits, sign = COLUMNS.get(metric, (metric, 3))[1], "" if p is None else "+"
    # rounding first, and adding 0.0, turns the "-0.000" of floating-point noise into 0.000
    mean, low, high = (
        f"{round(value, digits) + 0.0:{sign}.{digits}f}" for value in (interval.mean, interval.low, interval.high)
    )
    bounds = "[n/a]" if math.isnan(interval.low) else f"[{low}, {high}]"
    return f"{mean} {bounds}" + ("" if p is None else " p<0.001" if p < 0.001 else f" p={p:.3f}")


def slice_grid(phases: Phases) -> Grid:
    """The main metrics of each slice, with a row for every policy that has dialogues in it."""
    cells = []
    # Sliced all together: which keys give slices must not differ between the policies that are compared.
    for name, members in slices([t for trajectories in phases.values() for t in trajectories]).items():
        inside = set(map(id, members))
        for phase, trajectories in phases.items():
            mine = [trajectory for trajectory in trajectories if id(trajectory) in inside]
            if not mine:
                continue
            summary = summarise(mine, metrics=SLICE_METRICS)
            values = (cell(summary.metrics.get(metric), metric) for metric in SLICE_METRICS)
            cells.append([name, phase, str(summary.goals), str(summary.dialogues), *values])
    return ["slice", "policy", "goals", "dialogues", *map(title, SLICE_METRICS)], cells


def markdown(grid: Grid) -> str:
    """A Markdown table that no cell can break."""
    header, cells = grid

    def line(values: Iterable[str]) -> str:
        return "| " + " | ".join(_escape(" ".join(v.split())) for v in values) + " |\n"

    return line(header) + "|---" * len(header) + "|\n" + "".join(map(line, cells))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as it is, on every platform, in one move: a full disk or a kill leaves the old file."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    # User text may hold lone surrogates, which UTF-8 cannot encode: show them escaped rather than fail.
    draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    draft.replace(path)
    return path


def _escape(text: str) -> str:
    """No end of a cell, no link or image, no beginning of a tag; "p<0.001" is none, and is read in terminals, too."""
    text = re.sub(r"\\*\|", lambda bar: 2 * bar[0][:-1] + "\\|", text)  # a backslash before it would undo ours
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("](", "]\\("))


def _numbers(interval: Interval | None) -> list[str]:
    values = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
    return [_number(value) for value in values]


def _number(value: float | None) -> str:
    """Nine digits: more is floating-point noise that differs between machines."""
    return "" if value is None or math.isnan(value) else f"{value + 0.0:.9g}"
