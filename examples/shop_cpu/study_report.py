"""What study.py found, as a table and a plot. Warm starts have no runs of their own: every run evaluates its start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play

METRICS = ("tse", "success", "esndcg", "gre")
Row = dict[str, Any]


def start_of(variant: str) -> str:
    """The name of the row of what a variant was trained from."""
    return "warm start, single level" if "single level" in variant else "warm start, two levels"


def with_starts(runs: Sequence[Row]) -> list[Row]:
    """The runs, and before them the warm starts: of a seed, the mean over the evaluations of its runs."""
    starts: list[Row] = []
    for name, seed in dict.fromkeys((start_of(run["variant"]), run["seed"]) for run in runs):
        mine = [run for run in runs if start_of(run["variant"]) == name and run["seed"] == seed]
        names = [metric + decoding for decoding in ("", "_greedy") for metric in METRICS]
        means = {name: float(np.mean([run[f"{name}_before"] for run in mine])) for name in names}
        starts.append({"variant": name, "seed": seed, **means})
    return sorted(starts, key=lambda row: (row["variant"], row["seed"])) + list(runs)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95% t interval; NaN bounds for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def cell(values: Sequence[float], sign: str = "") -> str:
    """Mean and interval; the mean alone for one seed, nothing for none."""
    if not values:
        return ""
    mean, low, high = interval(values)
    return f"{mean:{sign}.1f}" + ("" if len(values) < 2 else f" [{low:{sign}.1f}, {high:{sign}.1f}]")


def holm(pairs: dict[str, Sequence[float]]) -> dict[str, float]:
    """p of each row's paired differences (t test, two-sided), corrected for their number after Holm; rows with fewer
    than two seeds have none."""
    raw = {name: float(stats.ttest_1samp(d, 0.0).pvalue) for name, d in pairs.items() if len(d) > 1}
    corrected, worst = {}, 0.0
    for rank, name in enumerate(sorted(raw, key=raw.__getitem__)):
        worst = max(worst, min(1.0, (len(raw) - rank) * raw[name]))
        corrected[name] = worst
    return corrected


def scripts_on(goals: int) -> dict[str, float]:
    """TSE of scripts that look at the hidden goal, on the same goals: what random choices give, what is achievable."""
    env = load_environment("shop")
    held = env.goals("heldout")[:goals]
    scripts = {"random": ScriptedPolicy(0.0, slip=0.0), "demonstrations": ScriptedPolicy(0.7, slip=0.0)}
    return {
        name: float(np.mean([play(env, goal, 0, 1, script).rewards["tse"] for goal in held]))
        for name, script in scripts.items()
    }


def table(rows: Sequence[Row]) -> list[str]:
    """One line a policy; differences are between runs of the same seed."""
    names = (
        *("policy", "seeds", "TSE", "minus its warm start", "minus GOPO", "p (Holm)", "TSE of each seed", "TSE greedy"),
        *("success", "ESNDCG", "GRE"),
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    tse = {(row["variant"], row["seed"]): row["tse"] for row in rows}
    against = {
        name: [
            row["tse"] - tse["GOPO", row["seed"]]
            for row in rows
            if row["variant"] == name and ("GOPO", row["seed"]) in tse
        ]
        for name in dict.fromkeys(row["variant"] for row in rows)
        if name != "GOPO"
    }
    p = holm(against)
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        gains = [row["tse"] - tse[start_of(name), row["seed"]] for row in mine if name != start_of(name)]
        seeds = ", ".join(f"{row['tse']:.1f}" for row in mine)
        success, esndcg, gre = (float(np.mean([row[metric] for row in mine])) for metric in METRICS[1:])
        lines.append(
            f"| {name} | {len(mine)} | {cell([row['tse'] for row in mine])} | {cell(gains, '+')} | "
            f"{cell(against.get(name, []), '+')} | {f'{p[name]:.3f}' if name in p else ''} | {seeds} | "
            f"{cell([row['tse_greedy'] for row in mine])} | {success:.3f} | {esndcg:.3f} | {gre:.3f} |"
        )
    return lines


def searched(tries: Sequence[Row]) -> list[str]:
    """What the search found, with the best of each method in bold."""
    lines = ["", "Learning rates that were tried, with a seed of its own:"]
    lines += ["", "| method | learning rates | joint return |", "|---|---|---|"]
    for found in tries:
        best = max(other["joint"] for other in tries if other["variant"] == found["variant"])
        joint = f"**{found['joint']:.3f}**" if found["joint"] == best else f"{found['joint']:.3f}"
        lines.append(f"| {found['variant']} | {', '.join(found['rates'])} | {joint} |")
    return lines


def write_report(record: dict[str, Any], path: Path) -> str:
    """Write the table and the plot beside the record at ``path``; returns the table's text."""
    lines: list[str] = []
    if record["runs"]:
        rows, scripts = with_starts(record["runs"]), scripts_on(record["goals"])
        plot(rows, scripts, path.with_suffix(".png"))
        lines += [
            f"TSE on {record['goals']} held-out goals of `shop` after {record['updates']} updates of 64 dialogues:",
            "mean over seeds [95% t interval over seeds]; differences are paired by seed.",
            "",
            *table(rows),
            "",
            "Scripts that see the hidden goal: " + ", ".join(f"{k} {v:.1f}" for k, v in scripts.items()) + ".",
        ]
    lines += searched(record["search"]) if record["search"] else []
    path.with_suffix(".md").write_text("\n".join(lines).strip() + "\n")
    return "\n".join(lines)


def plot(rows: Sequence[Row], scripts: dict[str, float], path: Path) -> None:
    """One line per policy: every seed's TSE, their mean and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["variant"] for row in rows))[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.6), layout="constrained")
    for y, name in enumerate(names):
        mean, low, high = interval(values := [row["tse"] for row in rows if row["variant"] == name])
        color = "#6b7280" if name == start_of(name) else "#2563eb"
        axes.plot(values, [y] * len(values), "o", color=color, alpha=0.45, markersize=5)
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot([mean], [y], "D", color=color, markersize=7)
    for name, value in scripts.items():
        side = "left" if value < 50 else "right"
        axes.axvline(value, color="#bbbbbb", linestyle=":", linewidth=1)
        axes.text(value, len(names) - 0.4, f" {name} ", fontsize=8, color="#666666", ha=side)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names))
    axes.set_xlabel("TSE on held-out goals: seeds (dots), their mean with its 95% interval (diamond)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
