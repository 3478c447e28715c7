"""Time and peak memory of one expert update: coefficients and decision logits against the naive pairwise loss.

    python benchmarks/preference_step.py [--quick]

Prints two tables and writes JSON. README.md beside this file says what is measured, and how.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform as machine
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import FOR_MEMORY, in_fresh_process, peak, print_tables, reset_peak, shown, spread, timed, write
from measuring import RESULTS as FOLDER
from preference_methods import METHODS, NAIVE, Update, check
from rich.table import Table

RESULTS = FOLDER / "preference_step.json"


def time_cell(
    vocabulary: int, k: int, methods: list[str], repeats: int, naive_repeats: int, naive_seconds: float
) -> dict[str, list]:
    """Methods take turns within each round, forwards and backwards, so that load hits all of them alike.

    A naive method is left out of further rounds after ``naive_repeats`` or once it has taken ``naive_seconds``.
    """
    update = Update(vocabulary, k)
    rounds: dict[str, list] = {method: [] for method in [*methods, "coefficients"]}
    for method in methods:
        if method not in NAIVE:
            update.step(method)  # warm up
    for number in range(repeats):
        for method in methods if number % 2 == 0 else reversed(methods):
            spent = sum(once["wall"] for once in rounds[method])
            if method not in NAIVE or (number < naive_repeats and spent < naive_seconds):
                rounds[method].append(timed(lambda method=method: update.step(method)))
        rounds["coefficients"].append(timed(update.preference_advantages))
    return rounds


def memory_cell(vocabulary: int, k: int, method: str) -> float:
    """MiB that the first update adds to model, optimizer state and data. Call it in a fresh process."""
    Update(vocabulary=64, k=2, tokens=40).step(method)  # lazy imports, thread pools
    update = Update(vocabulary, k)
    for parameter in update.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update.optimizer.step()  # makes its state
    update.optimizer.zero_grad()
    gc.collect()
    baseline = reset_peak()
    update.step(method)
    return peak() - baseline


def in_process_of_its_own(what: str, threads: int, **arguments: object) -> Any:
    """What ``check``, ``time_cell`` or ``memory_cell`` returns."""
    return in_fresh_process(__file__, [what, threads, arguments], FOR_MEMORY if what == "memory" else None)


def leaves_out(method: str, vocabulary: int, k: int, max_gib: float) -> bool:
    """Three float32 tensors of (K, 320 tokens, vocabulary), the logits and their gradient's parts, would not fit."""
    return method == "group" and 3 * k * 320 * vocabulary * 4 > max_gib * 2**30


def summary(rounds: dict[str, list]) -> dict:
    """Seconds of each method, and ours over the plain policy gradient of the same round, by both clocks."""
    both = list(zip(rounds["ours"], rounds["policy_gradient"], strict=True))
    return {
        "seconds": {m: spread([once["wall"] for once in of_method]) for m, of_method in rounds.items() if of_method},
        "ours_over_policy_gradient": {
            clock: spread([ours[clock] / plain[clock] for ours, plain in both]) for clock in ("wall", "cpu")
        },
    }


def measure(args: argparse.Namespace) -> dict:
    """Every cell of the grid that is not there yet. The file is written after each: a kill loses one cell."""
    results: dict = {
        "machine": {"cores": os.cpu_count(), "threads": args.threads, "arch": machine.machine()},
        "versions": {"python": machine.python_version(), "torch": torch.__version__},
        "gradient_error": in_process_of_its_own("check", args.threads),
        "cells": json.loads(args.out.read_text())["cells"] if args.resume and args.out.exists() else [],
    }
    there = [(cell["vocabulary"], cell["k"]) for cell in results["cells"]]
    for vocabulary, k in itertools.product(args.vocabulary, args.k):
        if (vocabulary, k) in there:
            continue
        results["cells"].append(measure_cell(vocabulary, k, args))
        write(args.out, results)
        print(f"vocabulary {vocabulary}, K = {k}: done", file=sys.stderr, flush=True)
    return results


def measure_cell(vocabulary: int, k: int, args: argparse.Namespace) -> dict:
    shape = {"vocabulary": vocabulary, "k": k}
    methods = [m for m in METHODS if not leaves_out(m, vocabulary, k, args.max_gib)]
    options = {name: getattr(args, name) for name in ("repeats", "naive_repeats", "naive_seconds")}
    cell = shape | summary(in_process_of_its_own("time", args.threads, **shape, methods=methods, **options))
    cell["peak_mib"] = {}
    for m in methods:
        often = range(1 if m in NAIVE else args.memory_repeats)
        cell["peak_mib"][m] = spread([in_process_of_its_own("memory", args.threads, **shape, method=m) for _ in often])
    return cell


def tables(results: dict) -> list[Table]:
    cell = partial(shown, nothing="too large")
    seconds = Table(title="seconds of one update: median, and range of several")
    memory = Table(title="peak memory above model and optimizer state, MiB")
    for table, extra in ((seconds, ["ours / policy gradient, CPU time", "coefficients, ms"]), (memory, [])):
        for name in ("vocabulary", "K", *METHODS, *extra):
            table.add_column(name.replace("_", " "), justify="right")
    for row in results["cells"]:
        shape = (str(row["vocabulary"]), str(row["k"]))
        share = row["ours_over_policy_gradient"]["cpu"]
        spent = row["seconds"]["coefficients"]["median"] * 1000
        times = [cell(row["seconds"].get(m), 3) for m in METHODS]
        seconds.add_row(*shape, *times, cell(share, 3), f"{spent:.2f}")
        memory.add_row(*shape, *[cell(row["peak_mib"].get(m), 0) for m in METHODS])
    return [seconds, memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="K = 2, 4; vocabulary 2000; fewer repeats")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2000, 50_000, 150_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--naive_repeats", type=int, default=3)
    parser.add_argument("--naive_seconds", type=float, default=120.0)
    parser.add_argument("--memory_repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_gib", type=float, default=6.0, help="leave out `group` where its logits need more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the cells that --out holds")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        what, threads, arguments = json.loads(args.cell)
        torch.set_num_threads(threads)
        print(json.dumps({"check": check, "time": time_cell, "memory": memory_cell}[what](**arguments)))
        return
    if args.quick:
        args.k, args.vocabulary, args.repeats, args.naive_repeats = [2, 4], [2000], 7, 2
        args.memory_repeats = 2
    results = measure(args)
    agreed = f"gradients agree to {max(results['gradient_error'].values()):.1e}; written to {args.out}"
    print_tables(tables(results), agreed)


if __name__ == "__main__":
    main()
