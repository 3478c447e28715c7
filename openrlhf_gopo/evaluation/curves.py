"""Learning curves from a metrics file: JSON lines, one object per step, any key may be missing from any line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openrlhf_gopo.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP = "global_step"
STOP_PREFIX = "rollout/stop/"
SMOOTH_FROM = 40  # points; from here on a running mean is drawn over the raw curve
# Okabe-Ito: told apart by colour-blind readers
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7F7F7F"
BLACK = "#000000"
STOP_COLOURS = {
    "completed": GREEN,
    "closed": PURPLE,
    "user_left": RED,
    "max_turns": "#333333",
    "max_tokens": "#56B4E9",
    "failed": GREY,
}

LEGEND: dict[str, Any] = {"frameon": True, "framealpha": 0.85, "edgecolor": "none", "fontsize": 8.5}

Series = tuple[list[float], list[float]]  # steps, values


@dataclass(frozen=True)
class Metrics:
    """Every numeric key of a metrics file as (steps, values), in step order."""

    series: Mapping[str, Series]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Metrics:
        """Read a metrics file. A step written twice (a resumed run) keeps its last value; NaN and text are skipped.

        The unfinished last line of a killed run is ignored, and so is an earlier run that wrote into the same file.

        Raises:
            DataError: the file is missing, or a line is no JSON object; names ``file:line``.
        """
        points: dict[str, dict[float, float]] = {}
        for index, record in enumerate(_records(Path(path))):
            step = record.get(STEP, index)
            if step == 0 and "timing/imports" in record:  # what a run writes first, unless it goes on from a checkpoint
                points.clear()
            for key, value in record.items():
                if _is_finite(value):
                    points.setdefault(key, {})[step] = float(value)
        return cls({key: (sorted(found), [found[step] for step in sorted(found)]) for key, found in points.items()})

    def get(self, key: str) -> Series | None:
        return self.series.get(key)


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such metrics file; give the .jsonl that training wrote")
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: the writer was killed
                continue
            raise DataError(f"{path}:{number}: not JSON ({error}); delete or repair that line") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        if not _is_finite(record.get(STEP, 0)):
            raise DataError(f"{path}:{number}:{STEP}: expected a number, got {record[STEP]!r:.80}; repair that line")
        records.append(record)
    return records


def _is_finite(value: Any) -> bool:
    """A number that a curve can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def write_learning_curves(metrics_jsonl: str | os.PathLike[str], png: str | os.PathLike[str]) -> Path:
    """Draw four panels (TSE, success and stop reasons, preference learning, KL) into a PNG.

    Raises:
        DataError: see ``Metrics.read``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    metrics = Metrics.read(metrics_jsonl)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04)  # pads in inches
    figure = Figure(figsize=(12, 8.4), dpi=120, layout=layout)
    FigureCanvasAgg(figure)  # not pyplot: a trainer may draw from any thread, and keeps its own backend
    panels = figure.subplots(2, 2)
    _tse(panels[0][0], metrics)
    _endings(panels[0][1], metrics)
    _preferences(panels[1][0], metrics)
    _kl(panels[1][1], metrics)
    for axes in panels.flat:
        smoothed = any(line.get_alpha() for line in axes.get_lines())
        axes.set_xlabel("training step (bold: running mean)" if smoothed else "training step")
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png)
    return Path(png)


def _line(axes: Axes, series: Series | None, label: str, colour: str, **style: Any) -> bool:
    """Draw one curve, noisy ones faint under their running mean; False when there is nothing to draw."""
    if series is None:
        return False
    steps, values = series
    style = {"linewidth": 1.8, "marker": "o" if len(steps) < SMOOTH_FROM else "", "markersize": 3.5} | style
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, color=colour, label=label, **style)
        return True
    width = max(5, len(steps) // 20) | 1  # odd, so that the mean is centred
    weights = np.convolve(np.ones(len(values)), np.ones(width), "same")  # fewer neighbours at both ends
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)  # the raw curve
    smooth = np.convolve(values, np.ones(width), "same") / weights
    axes.plot(steps, smooth, color=colour, label=label, **style)
    return True


def _finish(
    axes: Axes, title: str, ylabel: str, drawn: Sequence[bool], columns: int = 1, right: Axes | None = None
) -> None:
    """Title, label and one legend, also for the second axes ``right``, or a note when nothing was drawn."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_ylabel(ylabel)
    if any(drawn):
        both = [axes] if right is None else [axes, right]
        handles = [handle for one in both for handle in one.get_legend_handles_labels()[0]]
        both[-1].legend(handles=handles, ncols=columns, **LEGEND)  # the last is on top: no curve crosses it
    else:
        axes.text(0.5, 0.5, "not in the metrics file", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])


def _heldout(axes: Axes, metrics: Metrics, metric: str, label: str) -> bool:
    """Held-out evaluations as points over the training curve, each with its 95% interval over goals, by decoding."""
    decodings = (("eval_", BLUE, "o", "-", label), ("eval_greedy_", BLACK, "s", ":", f"{label}, greedy"))
    drawn = False
    for prefix, colour, marker, dashes, name in decodings:
        points, low, high = (metrics.get(f"{prefix}{metric}{part}") for part in ("", "_low", "_high"))
        if points is None:
            continue
        drawn = True
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dashes,
            "linewidth": 1.8,
            "markersize": 4.5,
        }
        if low and high and low[0] == high[0] == points[0]:
            reach = [np.subtract(points[1], low[1]), np.subtract(high[1], points[1])]
            axes.errorbar(*points, yerr=np.maximum(reach, 0.0), capsize=3, zorder=3, label=f"{name} [95%]", **style)
        else:
            axes.plot(*points, zorder=3, label=name, **style)
    return drawn


def _tse(axes: Axes, metrics: Metrics) -> None:
    drawn = [
        _line(axes, metrics.get("rollout/tse"), "training rollouts", ORANGE),
        _heldout(axes, metrics, "tse", "held-out goals"),
    ]
    _finish(axes, "Task-focused Sequential Engagement", "TSE (0 to 100)", drawn)


def _endings(axes: Axes, metrics: Metrics) -> None:
    drawn = [
        _line(axes, metrics.get("rollout/success"), "success, training", ORANGE, linewidth=2.2),
        _heldout(axes, metrics, "success", "success, held-out"),
    ]
    for reason, colour in STOP_COLOURS.items():
        series = metrics.get(STOP_PREFIX + reason)
        drawn.append(_line(axes, series, f"stop: {reason}", colour, linestyle="--", linewidth=1.2, marker=""))
    axes.set_ylim(-0.03, 1.4)  # the room above 1 is the legend's
    axes.set_yticks(np.linspace(0, 1, 6))
    _finish(axes, "Success and stop reasons", "share of dialogues", drawn, columns=2)


def _preferences(axes: Axes, metrics: Metrics) -> None:
    right = axes.twinx()
    accuracy, loss = metrics.get("expert/pref_accuracy"), metrics.get("expert/pref_loss")
    if accuracy and set(accuracy[1]) == {0.5}:  # measured against the sampler itself, both are constants
        accuracy = loss = None
    foretold = None if accuracy else metrics.get("expert/q_r2")
    drawn = [
        _line(axes, accuracy, "preference accuracy (left)", BLUE)
        or _line(axes, foretold, "returns explained by Q beforehand (left)", BLUE),
        _line(right, loss, "preference loss (right)", RED),
        _line(right, metrics.get("expert/entropy_loss"), "expert entropy (right)", GREEN),
    ]
    axes.set_ylim(-0.03 if not foretold else min(-0.03, *foretold[1]), 1.03)
    if drawn[0]:
        axes.axhline(0.0 if foretold else 0.5, color=GREY, linewidth=1, linestyle=":")
    else:
        axes.set_yticks([])
    if any(drawn[1:]):
        right.set_ylabel("nats")
        right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
        right.spines["top"].set_visible(False)
    else:
        right.set_axis_off()
    left = "share of variance" if foretold else "pairs ordered rightly" if drawn[0] else ""
    _finish(axes, "Expert: credit and entropy", left, drawn, right=right)


def _kl(axes: Axes, metrics: Metrics) -> None:
    drawn = [
        _line(axes, metrics.get("expert/kl"), "expert", BLUE),
        _line(axes, metrics.get("responder/kl"), "responder", ORANGE),
    ]
    if any(drawn):
        axes.axhline(0.0, color=GREY, linewidth=1, linestyle=":")
    _finish(axes, "KL to the initial model", "KL (nats)", drawn)
