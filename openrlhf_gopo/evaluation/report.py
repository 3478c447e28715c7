"""A results folder that a person can read: tables, pictures, and an HTML page to read dialogues side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from openrlhf_gopo.evaluation.curves import write_learning_curves
from openrlhf_gopo.evaluation.intervals import write_intervals
from openrlhf_gopo.evaluation.page import write_page
from openrlhf_gopo.evaluation.summary import Summary, summarise
from openrlhf_gopo.evaluation.tables import Phases, Table, markdown, slice_grid, write_text

__all__ = ["table_text", "write_learning_curves", "write_results"]


def table_text(results: Mapping[str, Summary]) -> str:
    """The main table in Markdown: policies, differences to the first one, and stop reasons.

    Raises:
        ValueError: ``results`` is empty.
    """
    return Table.of(results).text()


def write_results(
    folder: str | os.PathLike[str],
    phases: Phases,
    metrics_jsonl: str | os.PathLike[str] | None = None,
    compared: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write table.md, table.csv, slices.md, intervals.png, transcripts.html and, with metrics, learning_curves.png.

    ``phases`` maps a policy or phase ("before training, greedy") to its scored dialogues; ``compared`` maps a phase to
    the one that it is compared with, None: all later ones with the first. Returns the paths by name.

    Raises:
        ValueError: ``phases`` is empty.
        DataError: the metrics file is missing or malformed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    if metrics_jsonl is not None:
        paths["learning_curves"] = write_learning_curves(metrics_jsonl, folder / "learning_curves.png")
    table = Table.of({name: summarise(trajectories) for name, trajectories in phases.items()}, compared)
    slices = slice_grid(phases)
    paths["table"] = write_text(folder / "table.md", table.text())
    paths["csv"] = table.write_csv(folder / "table.csv")
    paths["slices"] = write_text(folder / "slices.md", markdown(slices))
    paths["intervals"] = write_intervals(table.results, folder / "intervals.png")
    pictures = {"Intervals": paths["intervals"]}
    if metrics_jsonl is not None:
        pictures["Learning curves"] = paths["learning_curves"]
    paths["transcripts"] = write_page(folder / "transcripts.html", phases, table, slices, pictures)
    return paths
