"""A picture of the main table: each policy's mean and interval, metric by metric."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from openrlhf_gopo.evaluation.curves import BLUE, GREY
from openrlhf_gopo.evaluation.summary import Summary
from openrlhf_gopo.evaluation.tables import title

SHOWN = ("tse", "success", "esndcg", "gre", "turns")
LONGEST = 28  # characters of a policy's name


def write_intervals(results: Mapping[str, Summary], png: str | os.PathLike[str]) -> Path:
    """Draw one panel per metric of ``SHOWN`` that a policy has: a dot and its 95% interval over goals per policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [metric for metric in SHOWN if any(metric in s.metrics for s in results.values())] or ["tse"]
    size = (2.4 + 2.3 * len(metrics), 1.2 + 0.34 * len(results))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, as in the learning curves
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for row, summary in enumerate(results.values()):
            interval = summary.metrics.get(metric)
            if interval is None:
                axes.text(
                    0.5, row, "not measured", color=GREY, fontsize=8, va="center", transform=axes.get_yaxis_transform()
                )
                continue
            if not math.isnan(interval.low):
                axes.plot([interval.low, interval.high], [row, row], color=BLUE, linewidth=2.2, alpha=0.55)
            axes.plot([interval.mean], [row], color=BLUE, marker="o", markersize=6)
        axes.set_title(title(metric), loc="left", fontweight="bold", fontsize=10)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(results)), [_short(name) for name in results])
    panels[0].set_ylim(len(results) - 0.4, -0.6)  # the first policy on top
    figure.savefig(png)
    return Path(png)


def _short(name: str) -> str:
    """One line that matplotlib takes literally: ``$`` starts mathematics, and no font has lone surrogates."""
    name = " ".join(name.encode("utf-8", "replace").decode().split()).replace("$", r"\$")
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
